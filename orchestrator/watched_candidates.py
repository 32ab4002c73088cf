"""What happens while candidates are tried: said, shown in a table, and models that are beaten collected.

In: candidates as they begin and end. Out: events. Knows no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from orchestrator.candidates import Candidates
from orchestrator.compression.limits import misses
from orchestrator.errors import CompressionFailed
from orchestrator.families import Families
from orchestrator.progress import Event, Report, format_seconds
from orchestrator.recipe_compression import Compression
from orchestrator.records import TrialRecord
from orchestrator.tuning.keeper import Keeper
from orchestrator.tuning.measured import Measured
from orchestrator.tuning.outcome import records_of
from orchestrator.tuning.space import Point
from orchestrator.tuning.study import LOCATION, Asked, Study

_GIVE_UP_AFTER = 5
_SHOWN = ("macro_f1", "latency_ms", "size_mb")


class WatchedCandidates:
    """Its methods are a ``tuning.on_ray.Watcher``'s."""

    def __init__(
        self, study: Study, candidates: Candidates, keeper: Keeper, families: Families, settings: Compression,
        before: Mapping[str, float], report: Report,
    ) -> None:  # fmt: skip
        self.study, self.candidates, self.keeper, self.settings = study, candidates, keeper, settings
        self.families = families
        self.before, self.report = before, report
        self.running: dict[int, tuple[Point, float]] = {}
        ended = [trial for trial in records_of(study) if trial.state != "running"]
        self.ended_before = len(ended)
        for trial in ended:
            self._look_further(trial)
        self.ended_now, self.failed = 0, list[TrialRecord]()

    def begun(self, asked: Asked) -> None:
        self.study.note(asked.number, **{LOCATION: self.candidates.location_of(asked.number)})
        self.running[asked.number] = (asked.point, time.monotonic())
        self._progress()

    def epoch(self, asked: Asked, epoch: int, measured: Measured) -> None:
        """Candidates are measured once, at their end."""

    def ended(self, asked: Asked, measured: Measured) -> None:
        """Raises CompressionFailed when one after the other fails: the recipe is to blame, not their values."""
        self.running.pop(asked.number, None)
        trial = TrialRecord(
            number=asked.number, state=measured.state, parameters=asked.point, metrics=measured.metrics,
            violations=tuple(self.study.violations(measured).values()), seconds=measured.seconds,
            location=measured.location or self.candidates.location_of(asked.number), error=measured.error,
            kind=measured.kind,
        )  # fmt: skip
        self.keeper.decide(trial)
        self._look_further(trial)
        self.ended_now += 1
        self.failed += [trial] if trial.state == "failed" else []
        self.report(Event("compress", message=self._told(trial)))
        self._progress()
        if not self.keeper.kept and len(self.failed) == self.ended_now >= _GIVE_UP_AFTER:
            raise CompressionFailed(f"{trial.error} (all {len(self.failed)} candidates failed)", "try another form")

    def _look_further(self, trial: TrialRecord) -> None:
        """Done again for all when a sweep goes on: a kill may have come between a candidate's end and this."""
        self.study.enqueue(self.families.after(trial))

    def waiting(self) -> None:
        said = "no candidate can begin: something else is using the cluster; see who: ray status, ray list actors"
        self.report(Event("compress", message=said))

    def _told(self, trial: TrialRecord) -> str:
        if trial.state == "failed":
            return f"candidate {trial.number} failed: {trial.error}; {values_of(trial.parameters)}"
        m = trial.metrics
        scores = ", ".join(f"{name} {m[name]:.4g}" for name in _SHOWN if name in m)
        missed = misses(self.settings.limits, {"memory_mb": 0.0} | m, self.before)
        outside = f", outside of {', '.join(miss.limit for miss in missed)}" if missed else ""
        return (
            f"candidate {trial.number}: {scores}, {m['speedup']:.1f} times as fast{outside}, "
            f"in {format_seconds(trial.seconds)}; {values_of(trial.parameters)}"
        )

    def _progress(self) -> None:
        figures: dict[str, float | int | str] = {}
        if self.running:
            figures["running"] = ", ".join(map(str, sorted(self.running)))
        done = self.ended_before + self.ended_now
        total = max(done, self.study.tuning.trials)
        self.report(Event("compress", done=done, total=total, figures=figures, table=self._table()))

    def _table(self) -> tuple[tuple[str, ...], ...]:
        """Those that no other beats, and what runs now."""
        rows: list[tuple[str, ...]] = [("candidate", *_SHOWN, "for", "values")]
        for trial in self.keeper.kept[:4]:
            scores = (f"{trial.metrics[name]:.4g}" if name in trial.metrics else "" for name in _SHOWN)
            rows.append((f"{trial.number} kept", *scores, format_seconds(trial.seconds), values_of(trial.parameters)))
        for number, (point, began_s) in sorted(self.running.items()):
            took = format_seconds(time.monotonic() - began_s)
            rows.append((str(number), *("" for _ in _SHOWN), took, values_of(point)))
        return tuple(rows)


def values_of(point: Point) -> str:
    """For people: ``layers 0.5, form openvino-int8``; what is untouched is left out."""
    shown = {path.removeprefix("compression."): value for path, value in point.items()}
    parts = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
             if not _is_untouched(value)]  # fmt: skip
    return ", ".join(parts)


def _is_untouched(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value == 1)
