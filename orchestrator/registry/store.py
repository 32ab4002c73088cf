"""The registry: versions that never change, aliases moved atomically, and a log that shows if it was edited.

In: a saved model's folder and its records. Out: VersionRecord values. A version is visible only once all its files are
there; several processes may register at once.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from orchestrator.errors import ConflictError, IntegrityError, ModelNotFound, UserError
from orchestrator.records import VersionRecord
from orchestrator.registry import schema
from orchestrator.section import NAME_PATTERN
from orchestrator.storage import MANIFEST, Storage, sha256_file, sha256_json, version_location

CHAMPION, CHALLENGER = "champion", "challenger"
_TRIES = 50
_MAX_VERSION = 2**31 - 1
"""The largest number that every database's integer column holds."""


@dataclass(frozen=True)
class AuditLine:
    number: int
    time: str
    actor: str
    action: str
    name: str
    alias: str
    version: int | None
    previous: int | None
    reason: str
    chain: str


class Registry:
    def __init__(self, storage: Storage, url: str | None = None) -> None:
        """``url``: an SQLAlchemy URL; None: a SQLite file in the storage, which must then be local."""
        self.storage, self.engine = storage, schema.connect(storage, url)

    def register(self, draft: VersionRecord, files: Mapping[str, Path]) -> VersionRecord:
        """Copy ``files`` (name in the version -> file or folder) and make them the next version of ``draft.name``.

        ``draft.version``, ``location`` and ``manifest_sha256`` are filled in here. The same model registered again is the
        version it already is.
        """
        _check_name(draft.name, "model name")
        for _ in range(_TRIES):
            if known := self._by_model(draft.name, draft.model):
                return known
            number = self._next_number(draft.name)
            # A name of its own: two processes after the same number never write into, or remove, one folder.
            staged = f"{version_location(draft.name, number)}-{uuid.uuid4().hex[:8]}"
            with self.storage.publish(staged) as folder:
                for name, source in files.items():
                    _copy(source, folder / name)
            sealed = sha256_file(self.storage.path(staged) / MANIFEST)
            record = draft.model_copy(update={"version": number, "location": staged, "manifest_sha256": sealed,
                                              "aliases": ()})  # fmt: skip
            try:
                self._insert(record)
            except sa.exc.IntegrityError:
                self.storage.remove(staged)  # another process took this number, or registered this very model
                continue
            return record
        raise ConflictError(f"could not get a version number for {draft.name} in {_TRIES} tries", "try again")

    def _insert(self, record: VersionRecord) -> None:
        with self.engine.begin() as connection:
            connection.execute(schema.versions.insert().values(
                name=record.name, version=record.version, model=record.model,
                record=record.model_dump_json(), manifest_sha256=record.manifest_sha256,
            ))  # fmt: skip
            self._log(connection, "register", record.name, "", record.version, None, record.decision)

    def _next_number(self, name: str) -> int:
        with self.engine.connect() as connection:
            query = sa.select(sa.func.max(schema.versions.c.version)).where(schema.versions.c.name == name)
            return (connection.execute(query).scalar() or 0) + 1

    def _by_model(self, name: str, model: str) -> VersionRecord | None:
        table = schema.versions
        with self.engine.connect() as connection:
            query = sa.select(table.c.version).where(table.c.name == name, table.c.model == model)
            version = connection.execute(query).scalar()
        return None if version is None else self.get(name, version)

    def names(self) -> list[str]:
        with self.engine.connect() as connection:
            return list(connection.execute(sa.select(schema.versions.c.name).distinct().order_by("name")).scalars())

    def versions(self, name: str) -> list[VersionRecord]:
        """All versions, oldest first."""
        table = schema.versions
        with self.engine.connect() as connection:
            query = sa.select(table.c.record).where(table.c.name == name).order_by(table.c.version)
            rows = connection.execute(query).scalars().all()
            pointed = self._aliases(connection, name)
        return [_with_aliases(VersionRecord.model_validate_json(row), pointed) for row in rows]

    def get(self, name: str, version: int | str) -> VersionRecord:
        """A version by its number or by an alias. Raises ModelNotFound, saying what there is."""
        _check_name(name, "model name")
        with self.engine.connect() as connection:
            pointed = self._aliases(connection, name)
            number = version if isinstance(version, int) else pointed.get(version, 0)
            number = number if 0 < number <= _MAX_VERSION else 0
            table = schema.versions
            query = sa.select(table.c.record).where(table.c.name == name, table.c.version == number)
            row = connection.execute(query).scalar()
        if row is None:
            raise self._not_found(name, version)
        return _with_aliases(VersionRecord.model_validate_json(row), pointed)

    def _not_found(self, name: str, version: int | str) -> ModelNotFound:
        known = [str(record.version) for record in self.versions(name)]
        if not known:
            return ModelNotFound(f"there is no model {name!r}", f"known are: {', '.join(self.names()) or 'none yet'}")
        return ModelNotFound(f"{name} has no version or alias {version!r}", f"its versions are {', '.join(known)}")

    def open(self, record: VersionRecord) -> Path:
        """The version's folder, every file verified against the manifest, and the manifest against the database."""
        with self.engine.connect() as connection:
            table = schema.versions
            query = sa.select(table.c.manifest_sha256).where(
                table.c.name == record.name, table.c.version == record.version
            )
            expected = connection.execute(query).scalar()
        folder = self.storage.fetch(record.location)
        if sha256_file(folder / MANIFEST) != expected:
            raise IntegrityError(f"{folder / MANIFEST} is not the one that was registered", "restore it from a copy")
        return folder

    def set_alias(
        self, name: str, alias: str, version: int, reason: str, *, expected: int | str | None = "any",
        action: str = "alias",
    ) -> int | None:  # fmt: skip
        """Point an alias at a version; returns where it pointed before.

        ``expected``: only if it points there now (None: nowhere); else ConflictError, and nothing has changed.
        """
        _check_name(alias, "alias")
        if alias.isdecimal():
            raise UserError(f"the alias {alias!r} reads like a version", "give it a letter")
        self.get(name, version)
        table = schema.aliases
        with self.engine.begin() as connection:
            key = sa.and_(table.c.name == name, table.c.alias == alias)
            previous = connection.execute(sa.select(table.c.version).where(key).with_for_update()).scalar()
            if expected != "any" and previous != expected:
                raise ConflictError(
                    f"{alias} of {name} points at {previous}, not at {expected}", "look again, then decide"
                )
            connection.execute(table.delete().where(key))
            connection.execute(table.insert().values(name=name, alias=alias, version=version))
            self._log(connection, action, name, alias, version, previous, reason)
        return previous

    def rollback(self, name: str, alias: str = CHAMPION) -> VersionRecord:
        """Point the alias at the version it pointed at before its last move forward. Raises UserError without one."""
        history: list[int] = []
        for line in self.audit(name):
            if line.alias == alias and line.version is not None:
                if line.action == "rollback":
                    history.pop()
                elif history[-1:] != [line.version]:
                    history.append(line.version)
        if len(history) < 2:
            raise UserError(f"{alias} of {name} has no earlier version", f"see them with: orchestrator models {name}")
        self.set_alias(name, alias, history[-2], f"back from version {history[-1]}", action="rollback")
        return self.get(name, history[-2])

    def audit(self, name: str | None = None) -> list[AuditLine]:
        """Who did what, oldest first."""
        query = sa.select(schema.audit).order_by(schema.audit.c.number)
        if name is not None:
            query = query.where(schema.audit.c.name == name)
        with self.engine.connect() as connection:
            return [AuditLine(**row) for row in connection.execute(query).mappings()]

    def verify_audit(self) -> None:
        """Raises IntegrityError at the first line that was edited, removed or moved, also from the end of the log."""
        chain = ""
        for number, line in enumerate(self.audit(), start=1):
            values = {key: value for key, value in line.__dict__.items() if key != "chain"}
            if line.number != number or line.chain != sha256_json([chain, values]):
                raise IntegrityError(f"line {number} of the audit log is not the one that was written", "see a backup")
            chain = line.chain
        self._check_log_is_whole()

    def _check_log_is_whole(self) -> None:
        """Every version was registered, and every alias is where its last line put it."""
        registered, moved = set(), {}
        for line in self.audit():
            if line.action == "register":
                registered.add((line.name, line.version))
            else:
                moved[line.name, line.alias] = line.version
        table, versions = schema.aliases.c, schema.versions.c
        with self.engine.connect() as connection:
            present = {tuple(row) for row in connection.execute(sa.select(versions.name, versions.version))}
            query = sa.select(table.name, table.alias, table.version)
            pointed = {(name, alias): version for name, alias, version in connection.execute(query)}
        if present != registered or pointed != moved:
            raise IntegrityError("the audit log does not tell how the registry came to be: lines are missing",
                                 "see a backup")  # fmt: skip

    def _log(
        self, connection: sa.Connection, action: str, name: str, alias: str, version: int | None, previous: int | None,
        reason: str,
    ) -> None:  # fmt: skip
        last = connection.execute(
            sa.select(schema.audit.c.number, schema.audit.c.chain).order_by(schema.audit.c.number.desc()).limit(1)
        ).first()
        values: dict[str, Any] = {
            "number": (last.number if last else 0) + 1, "time": datetime.now(UTC).isoformat(), "actor": _actor(),
            "action": action, "name": name, "alias": alias, "version": version, "previous": previous, "reason": reason,
        }  # fmt: skip
        chain = sha256_json([last.chain if last else "", values])
        connection.execute(schema.audit.insert().values(**values, chain=chain))

    def _aliases(self, connection: sa.Connection, name: str) -> dict[str, int]:
        table = schema.aliases
        rows = connection.execute(sa.select(table.c.alias, table.c.version).where(table.c.name == name))
        return {row.alias: row.version for row in rows}


def _with_aliases(record: VersionRecord, pointed: Mapping[str, int]) -> VersionRecord:
    mine = tuple(sorted(alias for alias, version in pointed.items() if version == record.version))
    return record.model_copy(update={"aliases": mine})


def _check_name(name: str, what: str) -> None:
    """Names become folders and URL segments: nothing that could lead elsewhere."""
    if not re.fullmatch(NAME_PATTERN[1:-1], name) or ".." in name:
        raise UserError(
            f"the {what} {name[:80]!r} is not allowed",
            "use lower-case letters, digits, '.', '-' and '_', at most 64, starting and ending with a letter or digit",
        )


def _copy(source: Path, target: Path) -> None:
    """Copies, never links: a version must not change when its source does."""
    for file in source.rglob("*") if source.is_dir() else [source]:
        if file.is_file():
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def _actor() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
