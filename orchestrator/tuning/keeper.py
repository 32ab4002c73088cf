"""What a study keeps on disk: the models of trials that may still win. The others' weights are collected as it goes.

In: trials as they end. Out: removed folders. Metrics, parameters and scores of every trial stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from orchestrator.recipe_tuning import MAXIMIZED
from orchestrator.records import TrialRecord
from orchestrator.storage import BEST, CHECKPOINTS, FOLDS, MEMBERS, MODEL, SCRATCH, Storage
from orchestrator.tuning.outcome import candidates, front, is_inside
from orchestrator.tuning.study import Study

_HEAVY = (MODEL, BEST, CHECKPOINTS, FOLDS, MEMBERS, SCRATCH)
_LATE = 64
"""So many beaten trials are looked at again."""


class Keeper:
    """Being beaten is for ever, so what is kept so far and a new trial are all that has to be compared."""

    def __init__(self, study: Study, storage: Storage, ended: Iterable[TrialRecord], generations: int = 1) -> None:
        """``generations``: of a population; 1 if the study is none."""
        self.study, self.storage, self.generations = study, storage, generations
        self.maximized = [objective in MAXIMIZED for objective in study.objectives]
        self.kept: list[TrialRecord] = []
        self.late = deque[TrialRecord](maxlen=_LATE + 2 * study.tuning.trials)
        self.spared = set[int]()
        for trial in ended:
            self.decide(trial)

    def decide(self, trial: TrialRecord) -> None:
        """About one more that has ended; collects what it beats, or itself."""
        self._look_for_heirs()
        pool = [*self.kept, trial]
        measured = candidates(pool, self.study.objectives, list(self.study.tuning.constraints))
        best = [t for t in measured if is_inside(t)] or measured
        numbers = front(best, self.study.objectives, self.maximized)
        if self.study.is_single:  # of equals, the earliest is the winner
            numbers = numbers[:1]
        self.kept = [t for t in pool if t.number in numbers]
        for beaten in (t for t in pool if t.number not in numbers):
            self._collect(beaten)
            if beaten.state == "pruned" or beaten.number in self.spared:
                self.late.append(beaten)
        self.sweep()

    def sweep(self) -> None:
        """A trial that was stopped may still be writing its model when it is beaten; one of a population may have heirs."""
        self._look_for_heirs()
        for trial in self.late:
            self._collect(trial)

    def _look_for_heirs(self) -> None:
        self.spared = self.study.ancestors(self.generations) if self.generations > 1 else set()

    def _collect(self, trial: TrialRecord) -> None:
        if trial.number in self.spared:
            return
        for location in (f"{trial.location}/{name}" for name in _HEAVY if trial.location):
            if not self.storage.is_local or self.storage.path(location).exists():
                self.storage.remove(location)
