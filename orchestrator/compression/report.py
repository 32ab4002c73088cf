"""The compression's report: what was tried, what was taken, what it cost in quality and where, on one HTML page.

In: the record and all candidates. Out: a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from orchestrator.compression import plots
from orchestrator.compression.limits import misses
from orchestrator.page import render
from orchestrator.recipe_compression import Compression
from orchestrator.records import CompressionRecord, TrialRecord

_TEMPLATE = Path(__file__).with_name("report.html")
_MAX_ROWS = 200
_UNCOMPRESSED = -1
_COLUMNS = ("macro_f1", "agreement", "latency_ms", "batch_ms", "size_mb")


def write_report(path: Path, record: CompressionRecord, trials: Sequence[TrialRecord], settings: Compression) -> None:
    again = {t.number: t for t in record.finalists}
    tried = [again.get(trial.number, trial) for trial in trials]
    inside = [t.number for t in tried if not misses(settings.limits, {"memory_mb": 0.0} | t.metrics, record.before)]
    limits = {name: value for name, value in settings.limits.model_dump().items() if value is not None}
    drop = settings.limits.macro_f1_drop
    least = None if drop is None else record.before["macro_f1"] - drop
    most = {"latency_ms": limits.get("latency_p50_ms"), "size_mb": _scaled(limits.get("size_bytes"), 1e-6)}
    values = {
        "record": record, "winner": record.winner, "before": record.before, "limits": limits,
        "plots": {cost: Markup(plots.trade_off(tried, cost, record.before, inside, record.pareto, record.winner.number,
                                               least, most[cost])) for cost in most},
        "finalists": _finalists(record), "rows": _rows(record, tried), "columns": _COLUMNS,
        "paths": sorted({path for t in trials for path in t.parameters}), "max_rows": _MAX_ROWS, "trials": trials,
        "absent": {name: why for name, why in (record.methods | record.forms).items() if why},
        "flagged": [name for name, change in record.classes.items() if change.is_flagged],
    }  # fmt: skip
    filters = {"value": told, "field": lambda path: path.removeprefix("compression."), "duration": _duration}
    path.write_text(render(_TEMPLATE, values, filters), encoding="utf-8")


def told(value: Any) -> str:
    """Numbers to three or four digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _finalists(record: CompressionRecord) -> list[dict[str, Any]]:
    """The uncompressed model first, then those that were measured once more."""
    rows: list[tuple[str, Mapping[str, float], Mapping[str, float]]] = [
        ("uncompressed", record.before, record.all_threads[_UNCOMPRESSED])
    ]
    for trial in record.finalists:
        chosen = ", chosen" if trial.number == record.winner.number else ""
        rows.append((f"{trial.number}{chosen}", trial.metrics, record.all_threads[trial.number]))
    return [{"name": name, "one": one, "all": all_} for name, one, all_ in rows]


def _rows(record: CompressionRecord, trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """The chosen one, then by the first objective, then those without a measurement."""
    first, sign = record.objectives[0], -1 if record.maximized[0] else 1
    ranked = sorted(trials, key=lambda t: (t.number != record.winner.number, first not in t.metrics,
                                           sign * t.metrics.get(first, 0.0), t.number))  # fmt: skip
    return [{"trial": t, "why": record.refused.get(t.number, "chosen")} for t in ranked[:_MAX_ROWS]]
