"""``orchestrator models``: what the registry holds, as values and as text, and the three things one may do to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.errors import UserError
from orchestrator.records import VersionRecord
from orchestrator.registry.store import Registry
from orchestrator.storage import Storage

_USAGE = "orchestrator models [NAME | promote NAME VERSION | rollback NAME | verify NAME]"
_METRICS = ("accuracy", "macro_f1", "roc_auc")


def act_on_models(storage: str, url: str | None, words: Sequence[str], alias: str) -> tuple[Any, str]:
    """Do what the words say; returns JSON values and text."""
    registry = Registry(Storage(storage), url)
    match list(words):
        case []:
            return _names(registry)
        case ["promote", name, version] if version.isascii() and version.isdigit():
            registry.set_alias(name, alias, int(version), "by hand", action="promote")
            return _one(registry.get(name, int(version)), f"{name} version {version} is {alias} now")
        case ["rollback", name]:
            record = registry.rollback(name, alias)
            return _one(record, f"{name} is back at version {record.version}")
        case ["verify", name]:
            return _verify(registry, name)
        case [name] if name not in {"promote", "rollback", "verify"}:
            return _versions(registry, name)
        case _:
            raise UserError(f"cannot read {' '.join(words)!r}", f"use: {_USAGE}")


def _names(registry: Registry) -> tuple[Any, str]:
    names = registry.names()
    lines = [f"{name}  {len(registry.versions(name))} versions" for name in names]
    return {"models": names}, "\n".join(lines) or "no models yet; make one with: orchestrator run RECIPE"


def _versions(registry: Registry, name: str) -> tuple[Any, str]:
    records = registry.versions(name) or [registry.get(name, 1)]  # the second raises, saying what there is
    lines = [
        f"{r.version:>4}  {', '.join(r.aliases) or '-':<12} "
        + "  ".join(f"{metric} {r.metrics[metric]:.4f}" for metric in _METRICS if metric in r.metrics)
        + f"  {r.created_at[:16]}  model {r.model[:12]}  dataset {r.dataset[:12]}  code {r.code_version}"
        for r in records
    ]
    return {"name": name, "versions": [r.model_dump(mode="json") for r in records]}, "\n".join(lines)


def _verify(registry: Registry, name: str) -> tuple[Any, str]:
    registry.verify_audit()
    records = registry.versions(name)
    for record in records:
        registry.open(record)
    return {
        "name": name,
        "verified": len(records),
    }, f"{len(records)} versions of {name} and the audit log are as written"


def _one(record: VersionRecord, text: str) -> tuple[Any, str]:
    return record.model_dump(mode="json"), text
