"""A trial whose command is killed while it gets its values gets the ones that it would have had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.recipe import Recipe
from orchestrator.recipe_tuning import Dimension, Tuning
from orchestrator.tuning.measured import Measured
from orchestrator.tuning.space import Space
from orchestrator.tuning.study import Asked, Study

RECIPE = Recipe.model_validate({"name": "r", "task": "text_classification", "data": {"source": "x.csv"}})
SPACE = {"training.learning_rate": {"log_uniform": [1e-5, 1e-2]}, "training.label_smoothing": {"uniform": [0.0, 0.5]},
         "training.batch_size": [8, 16, 32]}  # fmt: skip
ALIKE, TRIALS = 6, 9


class Killed(BaseException):
    """In the place of SIGKILL."""


def study(folder: Path, name: str, sampler: str) -> Study:
    space = Space(RECIPE, {path: Dimension.model_validate(d) for path, d in SPACE.items()})
    tuning = Tuning(trials=TRIALS, sampler=sampler, scheduler="none", startup_trials=4)
    return Study(f"sqlite:///{folder}/s.db", name, tuning, space, ("macro_f1",), 3)


def run(mine: Study, asked: Asked) -> None:
    mine.tell(asked.number, Measured("complete", {"macro_f1": 1.0 - 10 * asked.point["training.learning_rate"]}))


def kill_at(monkeypatch: pytest.MonkeyPatch, mine: Study, method: str, call: int) -> None:
    """In the place of this call of a method of Optuna's storage."""
    calls, storage = 0, type(mine.inner._storage)
    whole = getattr(storage, method)

    def dying(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return whole(*arguments, **named)

    monkeypatch.setattr(storage, method, dying)


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
@pytest.mark.parametrize(
    ("method", "call"), [("set_trial_param", 1), ("set_trial_param", 2), ("set_trial_user_attr", 1), ("set_trial_user_attr", 2)]
)  # fmt: skip
def test_it_goes_on_as_if_nothing_had_been(
    sampler: str, method: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study(tmp_path, "whole", sampler)
    for _ in range(TRIALS):
        run(whole, whole.ask())
    killed = study(tmp_path, "killed", sampler)
    for _ in range(ALIKE):
        run(killed, killed.ask())
    with monkeypatch.context() as patch:
        kill_at(patch, killed, method, call)
        with pytest.raises(Killed):
            killed.ask()
    again = study(tmp_path, "killed", sampler)
    assert len(again.trials()) == ALIKE + 1, "the kill came after the trial was there"
    (left,) = again.unfinished()
    run(again, left)
    for _ in range(TRIALS - ALIKE - 1):
        run(again, again.ask())
    assert [t.user_attrs["point"] for t in again.trials()] == [t.user_attrs["point"] for t in whole.trials()]


def test_a_sequence_goes_on_with_another_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = study(tmp_path, "sequence", "qmc")
    for _ in range(ALIKE):
        run(killed, killed.ask())
    with monkeypatch.context() as patch:
        kill_at(patch, killed, "set_trial_param", 1)
        with pytest.raises(Killed):
            killed.ask()
    again = study(tmp_path, "sequence", "qmc")
    (left,) = again.unfinished()
    rates = {trial.user_attrs["point"]["training.learning_rate"] for trial in again.trials()}
    assert left.number == ALIKE and len(rates) == ALIKE + 1


def test_a_point_that_was_set_beforehand_is_still_that_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = study(tmp_path, "set", "random")
    point = {"training.learning_rate": 1e-3, "training.label_smoothing": 0.25, "training.batch_size": 16}
    mine.enqueue([point, point | {"training.batch_size": 8}])
    with monkeypatch.context() as patch:
        kill_at(patch, mine, "set_trial_param", 2)
        with pytest.raises(Killed):
            mine.ask()
    again = study(tmp_path, "set", "random")
    assert [asked.point for asked in again.unfinished()] == [point]
    assert again.ask().point == point | {"training.batch_size": 8}
