"""Which trials are stopped early: Tune's schedulers, which know a trial by its number and remember an earlier run's trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.recipe_tuning import Tuning

EPOCH, VALUE = "epoch", "value"
"""Keys of a trial's results: epochs done, and the objective."""
_BRACKETS = 3
"""Of hyperband: trials are first compared after 1, 3 and 9 times ``min_epochs`` (for a reduction of 3)."""
Name = Literal["asha", "hyperband", "median", "pbt", "none"]


def scheduler_name(tuning: Tuning) -> Name:
    if tuning.scheduler == "auto":
        return "none" if len(tuning.objectives) > 1 else "asha"
    return tuning.scheduler


def make_scheduler(tuning: Tuning, maximize: bool, epochs: int) -> TrialScheduler:
    """``epochs``: of a trial that is not stopped."""
    mode, name = "max" if maximize else "min", scheduler_name(tuning)
    if name in ("none", "pbt") or epochs <= tuning.min_epochs:  # a population's trials all come to their end
        return FIFOScheduler()
    if name == "median":
        never_pause = float("inf")
        return _ByNumber(
            MedianStoppingRule(EPOCH, VALUE, mode, grace_period=tuning.min_epochs, min_time_slice=never_pause)
        )
    return _ByNumber(
        ASHAScheduler(
            EPOCH, VALUE, mode, max_t=epochs, grace_period=tuning.min_epochs, reduction_factor=tuning.reduction,
            brackets=_brackets(tuning, epochs) if name == "hyperband" else 1,
        )
    )  # fmt: skip


def _brackets(tuning: Tuning, epochs: int) -> int:
    """As many as have a rung below the last epoch."""
    fitting = [s for s in range(_BRACKETS) if tuning.min_epochs * tuning.reduction**s < epochs]
    return max(1, len(fitting))


def remember(scheduler: TrialScheduler, past: Mapping[int, Mapping[int, float]]) -> None:
    """Have a scheduler know earlier trials: number -> epoch (0-based) -> objective."""
    if isinstance(scheduler, _ByNumber):
        for number, values in past.items():
            scheduler.recall(number, values)


@dataclass(frozen=True)
class _Numbered:
    """A trial under a name that is the same after a restart."""

    trial_id: str


class _ByNumber(TrialScheduler):
    def __init__(self, inner: ASHAScheduler | MedianStoppingRule) -> None:
        super().__init__()
        self.inner = inner
        self.past: dict[tuple[int, int], str] = {}
        """Answers to recalled results: a trial that was killed before its answer was carried out asks again."""

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True  # it was told when it was made

    def recall(self, number: int, values: Mapping[int, float]) -> None:
        self._add(number)
        for epoch, value in sorted(values.items()):
            answer = self.inner.on_trial_result(None, _named(number), {EPOCH: epoch + 1, VALUE: value})
            self.past[number, epoch + 1] = answer

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._add(trial.config["number"])

    def _add(self, number: int) -> None:
        self.inner.on_trial_add(None, _named(number))
        if isinstance(self.inner, ASHAScheduler):  # it draws the bracket at random: not the same one after a restart
            brackets = self.inner._brackets
            self.inner._trial_info[_named(number).trial_id] = brackets[number % len(brackets)]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if VALUE not in result or result.get("done"):
            return TrialScheduler.CONTINUE
        number = trial.config["number"]
        answer: str = self.past.get((number, result[EPOCH])) or self.inner.on_trial_result(
            tune_controller, _named(number), result
        )
        return TrialScheduler.STOP if answer == TrialScheduler.STOP else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Its results were all seen."""

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Its results so far stay: they were true."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """As when it ended."""

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return FIFOScheduler().choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return str(self.inner.debug_string())


def _named(number: int) -> _Numbered:
    return _Numbered(f"trial {number}")
