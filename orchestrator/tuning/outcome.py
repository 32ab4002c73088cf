"""What a study has found: the winner, the front, what is noise and which fields mattered. Pure.

In: the trials as records. Out: numbers. A trial that was stopped early is a candidate like any other: what it had then is
what its model is worth.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

from orchestrator.errors import TuningFailed
from orchestrator.recipe_tuning import Tuning
from orchestrator.records import TrialRecord
from orchestrator.tuning.space import Space, told
from orchestrator.tuning.study import (
    DEFAULT,
    EPOCHS,
    ERROR,
    KIND,
    LOCATION,
    METRICS,
    PARENT,
    POINT,
    SECONDS,
    STARTED,
    Study,
)

_STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
_INSIDE = 1e-9
_FEWEST_FOR_IMPORTANCES = 4


def records_of(study: Study) -> list[TrialRecord]:
    """The study's own trials in order, those it learned from earlier studies left out."""
    return [_record(trial) for trial in study.trials() if POINT in trial.user_attrs]


def _record(trial: FrozenTrial) -> TrialRecord:
    known = trial.user_attrs
    return TrialRecord(
        number=trial.number, state="failed" if ERROR in known else _STATES.get(trial.state, "running"),
        parameters=known[POINT],
        metrics=known.get(METRICS, {}),
        history=tuple((epoch + 1, value) for epoch, value in sorted(trial.intermediate_values.items())),
        violations=tuple(trial.constraints.values()), epochs=known.get(EPOCHS, 0), seconds=known.get(SECONDS, 0.0),
        started=known.get(STARTED, 0.0), location=known.get(LOCATION, ""), error=known.get(ERROR, ""), kind=known.get(KIND, ""),
        is_default=known.get(DEFAULT, False), parent=known.get(PARENT),
    )  # fmt: skip


def is_inside(trial: TrialRecord) -> bool:
    return all(violation <= _INSIDE for violation in trial.violations)


def candidates(
    trials: Sequence[TrialRecord], objectives: Sequence[str], constrained: Sequence[str] = ()
) -> list[TrialRecord]:
    """Trials that were measured in all that counts."""
    needed = [*objectives, *constrained]
    return [
        t for t in trials if t.state in ("complete", "pruned") and all(_is_number(t.metrics.get(m)) for m in needed)
    ]


def choose_winner(
    trials: Sequence[TrialRecord], objectives: Sequence[str], maximized: Sequence[bool], tuning: Tuning
) -> TrialRecord:
    """The best within the constraints, the earliest of equals; of several objectives' front, the best in the first.

    Raises:
        TuningFailed: every trial failed, or none keeps within the constraints.
    """
    measured = candidates(trials, objectives, list(tuning.constraints))
    if not measured:
        raise all_failed(trials)
    inside = [trial for trial in measured if is_inside(trial)]
    if not inside:
        raise _none_inside(measured, tuning)
    best = [trial for trial in inside if trial.number in set(front(inside, objectives, maximized))]
    sign = 1 if maximized[0] else -1
    return max(best, key=lambda trial: (sign * trial.metrics[objectives[0]], -trial.number))


def all_failed(trials: Sequence[TrialRecord]) -> TuningFailed:
    first = next((trial for trial in trials if trial.error), None)
    if first is None:
        return TuningFailed("no trial came to the end of its first epoch", "raise tuning.time_budget_s")
    failed = sum(trial.state == "failed" for trial in trials)
    return TuningFailed(
        f"{first.error} (trial {first.number}; {failed} of {len(trials)} trials failed)",
        f"see whether the recipe's own values train: --set tuning=null; the traceback is in {first.location}",
    )


def _none_inside(measured: Sequence[TrialRecord], tuning: Tuning) -> TuningFailed:
    nearest = min(measured, key=lambda trial: max(trial.violations))
    shown = ", ".join(f"{name} {nearest.metrics[name]:g}" for name in tuning.constraints)
    bounds = ", ".join(
        " and ".join(f"{name} {word} {limit:g}" for word, limit in
                     (("at most", bound.at_most), ("at least", bound.at_least)) if limit is not None)
        for name, bound in tuning.constraints.items()
    )  # fmt: skip
    return TuningFailed(
        f"none of {len(measured)} trials keeps within tuning.constraints ({bounds}); the nearest is trial "
        f"{nearest.number} with {shown}",
        "loosen them, or widen the space, then run the same command again: the trials are kept",
    )


def front(trials: Sequence[TrialRecord], objectives: Sequence[str], maximized: Sequence[bool]) -> tuple[int, ...]:
    """Numbers of the trials that no other is at least as good as in every objective and better in one."""
    points = {
        trial.number: tuple(trial.metrics[o] if up else -trial.metrics[o] for o, up in zip(objectives, maximized, strict=True))
        for trial in trials
    }  # fmt: skip
    ranked = sorted(points, key=lambda number: points[number], reverse=True)
    kept: list[int] = []
    for number in ranked:  # whoever beats it comes before it
        mine = points[number]
        if not any(points[k] != mine and all(a >= b for a, b in zip(points[k], mine, strict=True)) for k in kept):
            kept.append(number)
    return tuple(sorted(kept))


def within_noise(
    trials: Sequence[TrialRecord], winner: TrialRecord, objective: str, noise: float, *, maximized: bool
) -> int:
    """How many trials' objectives are no further than ``noise`` from the winner's, itself included."""
    sign = 1 if maximized else -1
    gaps = [sign * (winner.metrics[objective] - trial.metrics[objective]) for trial in candidates(trials, [objective])]
    return sum(gap <= noise for gap in gaps)


def expected_optimism(standard_error: float, trials: int) -> float:
    """What the best of so many equally good, independently noisy scores lies above their true value on average (Blom's
    approximation of the largest order statistic of a normal)."""
    if trials < 2:
        return 0.0
    return standard_error * statistics.NormalDist().inv_cdf((trials - 0.375) / (trials + 0.25))


def importances(trials: Sequence[TrialRecord], space: Space, objective: str, *, maximized: bool) -> dict[str, float]:
    """Share of each searched field in what sets good trials apart (PED-ANOVA, Watanabe et al. 2023), the largest first.

    Fields that do not count in every trial are left out; without enough trials there are none.
    """
    known = [trial for trial in candidates(trials, [objective]) if trial.parameters]
    common = [p.path for p in space.parameters if all(p.path in trial.parameters for trial in known)]
    varied = [path for path in common if len({repr(trial.parameters[path]) for trial in known}) > 1]
    values = {trial.metrics[objective] for trial in known}
    if len(known) < _FEWEST_FOR_IMPORTANCES or not varied or len(values) == 1:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scratch = optuna.create_study(direction="maximize" if maximized else "minimize")
        for trial in known:
            point = {path: trial.parameters[path] for path in varied}
            scratch.add_trial(optuna.create_trial(
                params=space.encode(point), distributions=space.distributions(point), value=trial.metrics[objective]
            ))  # fmt: skip
        shares = optuna.importance.get_param_importances(
            scratch, evaluator=PedAnovaImportanceEvaluator(), params=varied
        )
    total = sum(shares.values())
    if not math.isfinite(total) or total <= 0:
        return {}
    return {path: share / total for path, share in sorted(shares.items(), key=lambda item: -item[1])}


def at_the_border(trial: TrialRecord, space: Space) -> list[str]:
    """Searched ranges whose end the trial took, within a hundredth of the range: the best may lie outside."""
    found = []
    for parameter in space.parameters:
        value, dimension = trial.parameters.get(parameter.path), parameter.dimension
        if dimension.kind == "choice" or value is None:
            continue
        scale = math.log if dimension.kind.startswith("log") else float
        low, high, at = scale(dimension.values[0]), scale(dimension.values[1]), scale(value)
        if min(at - low, high - at) < 0.01 * (high - low):
            found.append(f"{parameter.path} {value:g}, at the end of {told(dimension)}")
    return found


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
