"""The registry's tables and its connection: SQLite by default, any SQLAlchemy URL for a cluster."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from orchestrator.errors import UserError
from orchestrator.storage import REGISTRY_DATABASE, Storage

_BUSY_TIMEOUT_MS = 30_000
metadata = sa.MetaData()

versions = sa.Table(
    "versions", metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("model", sa.String(64), nullable=False),  # key of the ModelRecord: registering it twice is once
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("manifest_sha256", sa.String(64), nullable=False),
    sa.UniqueConstraint("name", "model"),
)  # fmt: skip
aliases = sa.Table(
    "aliases", metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("alias", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
)  # fmt: skip
audit = sa.Table(
    "audit", metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("time", sa.String(40), nullable=False),
    sa.Column("actor", sa.String(255), nullable=False),
    sa.Column("action", sa.String(32), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("alias", sa.String(64), nullable=False),
    sa.Column("version", sa.Integer),
    sa.Column("previous", sa.Integer),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("chain", sa.String(64), nullable=False),  # hash of this line and of the one before it
)  # fmt: skip


def connect(storage: Storage, url: str | None) -> sa.Engine:
    """The registry's database, its tables made if need be.

    Raises:
        UserError: the storage is remote and no database was named, or the URL cannot be opened.
    """
    if url is None:
        if not storage.is_local:
            raise UserError(
                f"the storage {storage.url} is remote, and a database file cannot lie there",
                "name a database all nodes reach: registry.url: postgresql+psycopg://user@host/name",
            )
        path = storage.path(REGISTRY_DATABASE)
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{path}"
    try:
        engine = sa.create_engine(url)
        if engine.dialect.name == "sqlite":
            _make_sqlite_safe(engine)
        metadata.create_all(engine)
    except (sa.exc.SQLAlchemyError, ModuleNotFoundError) as error:
        raise UserError(f"the registry's database cannot be opened ({str(error).splitlines()[0]})",
                        "check registry.url and that its driver is installed") from None  # fmt: skip
    return engine


def _make_sqlite_safe(engine: sa.Engine) -> None:
    """Survive a power cut, wait for other writers, and take the write lock when a transaction begins."""

    @sa.event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, record: object) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        connection.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    @sa.event.listens_for(engine, "begin")
    def begin_immediate(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
