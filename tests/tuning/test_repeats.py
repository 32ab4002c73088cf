"""A study that tries no point twice."""

from pathlib import Path

from orchestrator.recipe import Recipe
from orchestrator.recipe_tuning import Dimension, Tuning
from orchestrator.tuning.measured import Measured
from orchestrator.tuning.space import Space
from orchestrator.tuning.study import Study

RECIPE = Recipe.model_validate({"name": "r", "task": "text_classification", "data": {"source": "x.csv"}})


def study(folder: Path, dimensions: dict[str, object], *, repeats: bool) -> Study:
    space = Space(RECIPE, {path: Dimension.model_validate(d) for path, d in dimensions.items()})
    tuning = Tuning(trials=20, sampler="random", scheduler="none")
    return Study(f"sqlite:///{folder}/s.db", f"s{repeats}", tuning, space, ("macro_f1",), 3, repeats=repeats)


FINITE = {"training.batch_size": [8, 16, 32], "training.epochs": {"int": [1, 2]}}


def test_each_point_of_a_small_space_is_tried_once_and_then_there_is_nothing_left(tmp_path: Path) -> None:
    mine = study(tmp_path, FINITE, repeats=False)
    points, numbers = [], []
    while (asked := mine.following(20)) is not None:
        points.append(tuple(asked.point.values()))
        numbers.append(asked.number)
        mine.tell(asked.number, Measured("complete", {"macro_f1": 0.5}))
    assert sorted(points) == [(batch, epochs) for batch in (8, 16, 32) for epochs in (1, 2)]
    assert mine.counted() == 6 and numbers == list(range(6)), "what was chosen again has no number"


def test_a_search_that_may_repeat_itself_does(tmp_path: Path) -> None:
    mine = study(tmp_path, FINITE, repeats=True)
    points = []
    for _ in range(20):
        asked = mine.following(20)
        assert asked
        points.append(tuple(asked.point.values()))
        mine.tell(asked.number, Measured("complete", {"macro_f1": 0.5}))
    assert len(set(points)) < len(points)


def test_a_restarted_study_knows_what_was_tried(tmp_path: Path) -> None:
    first = study(tmp_path, FINITE, repeats=False)
    tried = []
    for _ in range(4):
        asked = first.following(20)
        assert asked
        tried.append(tuple(asked.point.values()))
        first.tell(asked.number, Measured("complete", {"macro_f1": 0.5}))
    second = study(tmp_path, FINITE, repeats=False)
    rest = []
    while (asked := second.following(20)) is not None:
        rest.append(tuple(asked.point.values()))
        second.tell(asked.number, Measured("complete", {"macro_f1": 0.5}))
    assert len(set(tried + rest)) == 6 and len(rest) == 2
