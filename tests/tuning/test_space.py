"""The search space, checked against the recipe's own types and ranges; and the samplers that draw from it."""

import math
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from spaces import PLAIN, space_of

from orchestrator.errors import RecipeError
from orchestrator.recipe_tuning import Dimension, Tuning
from orchestrator.tuning.measured import Measured
from orchestrator.tuning.outcome import choose_winner, front, importances, records_of
from orchestrator.tuning.samplers import make_sampler
from orchestrator.tuning.study import Study


@pytest.mark.parametrize(
    ("dimensions", "said"),
    [
        ({"training.learning_rat": {"uniform": [0, 1]}}, "is not a recipe field.*did you mean training.learning_rate"),
        ({"training.learning_rate": {"uniform": [0.1, 11]}}, "11.0 cannot be.*less than or equal to 10"),
        ({"training.epochs": {"uniform": [0.5, 3]}}, "0.5 cannot be"),
        ({"training.schedule": ["linear", "spiral"]}, "'spiral' cannot be"),
        ({"data.split.train": {"uniform": [0.1, 0.9]}}, "cannot be searched.*compared on the same rows"),
        ({"training.workers": [1, 2]}, "cannot be searched.*where a trial runs"),
        ({"model.dropout": {"uniform": [0, 0.3], "when": {"training.epochs": 3}}}, "training.epochs, which is not"),
        (
            {"training.epochs": [1, 2], "model.dropout": {"uniform": [0, 0.3], "when": {"training.epochs": 5}}},
            "5, outside of choice",
        ),
        (
            {"training.epochs": {"choice": [1, 2], "when": {"training.batch_size": 8}},
             "training.batch_size": {"choice": [8], "when": {"training.epochs": 1}}},
            "depend on each other",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_said_with_a_reason(dimensions: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        space_of(dimensions)
    assert re.search(said, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"unifrom": [0, 1]}, "exactly one of choice"),
        ({"uniform": [0, 1], "int": [0, 1]}, "exactly one of choice"),
        ({"uniform": [1, 1]}, "low below high"),
        ({"log_uniform": [0, 1]}, "low above 0"),
        ({"int": [0.5, 2]}, "whole numbers"),
        ({"quantized": [0, 1]}, re.escape("[low, high, step]")),
        ({"choice": []}, "at least one"),
        ({"choice": [1, 1]}, "twice"),
        (7, "needs a kind"),
    ],
)
def test_a_dimension_says_what_is_wrong_with_it(given: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Dimension.model_validate(given)


def test_a_dimension_is_written_as_it_was_read() -> None:
    for given in ({"log_uniform": [1e-5, 1e-3]}, {"choice": ["a"], "when": {"model.weights": ["none"]}}):
        assert Dimension.model_validate(given).model_dump(mode="json") == given


def test_a_field_counts_only_beside_the_values_it_depends_on() -> None:
    space = space_of({
        "model.dropout": {"uniform": [0.0, 0.3], "when": {"model.weights": "none"}}, "model.weights": ["none", "pretrained"],
    })  # fmt: skip
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    points = [space.draw(study.ask()) for _ in range(40)]
    assert {point["model.weights"] for point in points} == {"none", "pretrained"}
    assert all(("model.dropout" in point) == (point["model.weights"] == "none") for point in points)
    assert space.grid.__doc__ and space.contains(points[0]) and not space.contains({"model.dropout": 0.1})


def test_a_choice_may_be_a_whole_section() -> None:
    averages = [None, {"kind": "ema", "decay": 0.99}]
    space = space_of({"training.averaging": averages})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    drawn = [space.draw(study.ask()) for _ in range(20)]
    assert all(point["training.averaging"] in averages for point in drawn)
    recipe = space.recipe_at({"training.averaging": averages[1]})
    assert recipe.training.averaging is not None and recipe.training.averaging.decay == 0.99


def test_the_grid_has_every_combination_once() -> None:
    space = space_of({
        "training.epochs": {"int": [1, 3]}, "model.dropout": {"quantized": [0.0, 0.2, 0.1], "when": {"training.epochs": 3}}
    })  # fmt: skip
    grid = space.grid()
    assert [point["training.epochs"] for point in grid] == [1, 2, 3, 3, 3] and len(grid[0]) == 1
    with pytest.raises(RecipeError, match="no end of values"):
        space_of(PLAIN).grid()


def test_the_recipes_own_values_are_a_point_if_they_lie_inside() -> None:
    own = space_of(PLAIN).default(learning_rate=5e-5)
    assert own == {"training.learning_rate": 5e-5, "training.warmup_fraction": 0.06, "training.label_smoothing": 0.0,
                   "training.batch_size": 32}  # fmt: skip
    assert space_of(PLAIN).default(learning_rate=5e-2) is None


def objective(point: dict[str, Any]) -> float:
    """Best at a rate of 1e-4 and a warm-up of 0.3."""
    return (
        -((math.log10(point["training.learning_rate"]) + 4) ** 2) - 10 * (point["training.warmup_fraction"] - 0.3) ** 2
    )


def searched(tuning: Tuning, database: str, trials: int, name: str = "s") -> Study:
    study = Study(database, name, tuning, space_of(PLAIN), ["macro_f1"], seed=17)
    while study.counted() < trials:
        asked = study.ask()
        study.tell(asked.number, Measured("complete", {"macro_f1": objective(asked.point)}, epochs=1))
    return study


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "nsga2", "random", "qmc"])
def test_a_study_that_was_ended_goes_on_with_the_points_it_would_have_tried(tmp_path: Path, sampler: str) -> None:
    tuning = Tuning(sampler=sampler)
    whole = searched(tuning, f"sqlite:///{tmp_path}/whole.db", 24)
    for trials in (5, 13, 24):  # each time by new objects, as in a new process
        parts = searched(tuning, f"sqlite:///{tmp_path}/parts.db", trials)
    assert [t.parameters for t in records_of(parts)] == [t.parameters for t in records_of(whole)]
    best = choose_winner(records_of(whole), ["macro_f1"], [True], tuning)
    assert best.metrics["macro_f1"] > (-0.15 if sampler == "tpe" else -1.0)


def test_a_trial_that_was_under_way_is_found_again(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/s.db"
    study = searched(Tuning(), database, 3)
    asked = study.ask()
    study.report(asked.number, 0, 0.25)
    again = Study(database, "s", Tuning(), space_of(PLAIN), ["macro_f1"], seed=17)
    assert again.unfinished() == [asked] and again.counted() == 4
    again.report(asked.number, 0, 0.5)
    again.tell(asked.number, Measured("pruned", {"macro_f1": 0.25}, epochs=1))
    again.tell(asked.number, Measured("complete", {"macro_f1": 0.9}, epochs=9))
    last = records_of(again)[-1]
    assert (last.state, last.metrics, last.history) == ("pruned", {"macro_f1": 0.25}, ((1, 0.25),))


def test_a_study_learns_from_an_earlier_one_once(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/s.db"
    searched(Tuning(), database, 6, "earlier")
    study = Study(database, "later", Tuning(), space_of(PLAIN), ["macro_f1"], seed=17)
    assert study.learn_from(["earlier"]) == 6 and study.learn_from(["earlier"]) == 0
    assert study.counted() == 0 and len(study.trials()) == 6
    with pytest.raises(LookupError, match="there are: earlier"):
        study.learn_from(["nobody"])


def test_the_front_has_the_trials_that_no_other_beats(tmp_path: Path) -> None:
    study = Study(f"sqlite:///{tmp_path}/s.db", "s", Tuning(), space_of(PLAIN), ["macro_f1", "latency_ms"], seed=17)
    for value, latency in ((0.8, 9.0), (0.9, 20.0), (0.85, 20.0), (0.7, 5.0), (0.7, 9.0)):
        study.tell(study.ask().number, Measured("complete", {"macro_f1": value, "latency_ms": latency}))
    trials = records_of(study)
    assert front(trials, study.objectives, (True, False)) == (0, 1, 3)
    assert choose_winner(trials, study.objectives, (True, False), Tuning()).number == 1


def test_the_fields_that_matter_are_found(tmp_path: Path) -> None:
    study = searched(Tuning(sampler="random"), f"sqlite:///{tmp_path}/s.db", 60)
    shares = importances(records_of(study), study.space, "macro_f1", maximized=True)
    assert set(list(shares)[:2]) == {"training.learning_rate", "training.warmup_fraction"}
    assert abs(sum(shares.values()) - 1) < 1e-9


def test_each_trial_has_a_sampler_of_its_own() -> None:
    space = space_of(PLAIN)
    study = optuna.create_study()
    points = []
    for number in (0, 1, 0):
        study.sampler = make_sampler(Tuning(), space, 17, number)
        points.append(space.draw(study.ask()))
    assert points[0] == points[2] != points[1]
