"""A study that tries no point twice, and lets those of one family wait for the first."""

from collections.abc import Callable
from pathlib import Path

from orchestrator.recipe import Recipe
from orchestrator.recipe_tuning import Dimension, Tuning
from orchestrator.tuning.measured import Measured
from orchestrator.tuning.space import Point, Space
from orchestrator.tuning.study import Study, point_key

RECIPE = Recipe.model_validate({"name": "r", "task": "text_classification", "data": {"source": "x.csv"}})


def study(folder: Path, dimensions: dict[str, object], family: Callable[[Point], str] | None = None) -> Study:
    space = Space(RECIPE, {path: Dimension.model_validate(d) for path, d in dimensions.items()})
    tuning = Tuning(trials=20, sampler="random", scheduler="none")
    return Study(f"sqlite:///{folder}/s.db", "s", tuning, space, ("macro_f1",), 3, family=family)


FINITE = {"training.batch_size": [8, 16, 32], "training.epochs": {"int": [1, 2]}}


def test_each_point_of_a_small_space_is_tried_once_and_then_there_is_nothing_left(tmp_path: Path) -> None:
    mine = study(tmp_path, FINITE, point_key)
    points, numbers = [], []
    while (asked := mine.following(20)) is not None:
        points.append(tuple(asked.point.values()))
        numbers.append(asked.number)
        mine.tell(asked.number, Measured("complete", {"macro_f1": 0.5}))
    assert sorted(points) == [(batch, epochs) for batch in (8, 16, 32) for epochs in (1, 2)]
    assert mine.counted() == 6 and numbers == list(range(6)), "what was chosen again has no number"


def test_a_search_that_may_repeat_itself_does(tmp_path: Path) -> None:
    mine = study(tmp_path, FINITE)
    points = []
    for _ in range(20):
        asked = mine.following(20)
        assert asked
        points.append(tuple(asked.point.values()))
        mine.tell(asked.number, Measured("complete", {"macro_f1": 0.5}))
    assert len(set(points)) < len(points)


def test_a_restarted_study_knows_what_was_tried(tmp_path: Path) -> None:
    first = study(tmp_path, FINITE, point_key)
    tried = []
    for _ in range(4):
        asked = first.following(20)
        assert asked
        tried.append(tuple(asked.point.values()))
        first.tell(asked.number, Measured("complete", {"macro_f1": 0.5}))
    second = study(tmp_path, FINITE, point_key)
    rest = []
    while (asked := second.following(20)) is not None:
        rest.append(tuple(asked.point.values()))
        second.tell(asked.number, Measured("complete", {"macro_f1": 0.5}))
    assert len(set(tried + rest)) == 6 and len(rest) == 2


def of_one_batch_size(point: Point) -> str:
    return str(point["training.batch_size"])


def test_the_sampler_chooses_one_of_each_family_and_what_is_enqueued_comes_when_that_has_ended(tmp_path: Path) -> None:
    mine = study(tmp_path, FINITE, of_one_batch_size)
    first, second, third = (mine.following(20) for _ in range(3))
    assert first and second and third
    assert {asked.point["training.batch_size"] for asked in (first, second, third)} == {8, 16, 32}
    assert mine.following(20) is None, "what is left waits for the first of its family"

    other = first.point | {"training.epochs": 3 - first.point["training.epochs"]}
    mine.enqueue([other])
    assert mine.following(20) is None
    mine.tell(second.number, Measured("complete", {"macro_f1": 0.5}))
    assert mine.following(20) is None, "what was enqueued comes first, and still waits"
    mine.tell(first.number, Measured("failed", error="no", kind="raised"))
    waited = mine.following(20)
    assert waited and waited.point == other

    mine.tell(third.number, Measured("complete", {"macro_f1": 0.5}))
    rest = [mine.following(20), mine.following(20)]
    assert {asked.point["training.batch_size"] for asked in rest if asked} == {
        second.point["training.batch_size"], third.point["training.batch_size"]
    }  # fmt: skip
    assert mine.following(20) is None and mine.counted() == 6
