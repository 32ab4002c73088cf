"""Population-based training: who goes on from whom; runs that are handed on; a study of them on Ray."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spaces import PLAIN, space_of
from studying import Studying, recipe_text
from test_tune_stage import _Each, kill_trial

from orchestrator.errors import IntegrityError, RecipeError
from orchestrator.models.checkpoint import load_model
from orchestrator.recipe_tuning import Tuning
from orchestrator.records import TrialRecord
from orchestrator.session import Session
from orchestrator.storage import CHECKPOINTS, METRICS, MODEL, TRIALS, Storage
from orchestrator.training.metrics_log import read_metrics
from orchestrator.training.state import Position, inherit, latest_state, load_tensors, save_state
from orchestrator.tuning.measured import Measured
from orchestrator.tuning.population import Heir, Part, explored, next_heir
from orchestrator.tuning.study import Asked, Study

SPACE = space_of({"training.learning_rate": {"log_uniform": [1e-5, 1e-3]}})


def part(number: int, value: float | None, generation: int = 0, *, over: bool = True) -> Part:
    return Part(number, number % 8, generation, {"training.learning_rate": 1e-4}, over, value)


FIRST = [part(number, number / 10) for number in range(8)]


def heirs(parts: list[Part], generations: int = 2) -> list[Heir]:
    """As they would come one after the other."""
    parts, found = list(parts), []
    while heir := next_heir(parts, generations, SPACE, seed=1):
        found.append(heir)
        parts.append(Part(len(parts), heir.member, heir.generation, heir.point, False, None))
    return found


def test_the_worst_quarter_goes_on_from_the_best_with_other_values_and_the_others_as_they_are() -> None:
    found = heirs(FIRST)
    assert [heir.member for heir in found] == list(range(8)) and all(heir.generation == 1 for heir in found)
    for heir in found[:2]:
        assert heir.parent in (6, 7) and heir.point != FIRST[0].point and SPACE.contains(heir.point)
    assert [heir.parent for heir in found[2:]] == list(range(2, 8))
    assert all(heir.point == FIRST[0].point for heir in found[2:])


def test_who_goes_on_from_whom_does_not_depend_on_the_order_in_which_trials_ended() -> None:
    assert heirs(FIRST) == heirs(FIRST[::-1]) == heirs(random.Random(3).sample(FIRST, 8))


def test_no_generation_begins_before_the_one_before_is_over() -> None:
    assert heirs([*FIRST[:7], part(7, None, over=False)]) == []
    assert len(heirs(FIRST, generations=3)) == 8


def test_members_that_failed_are_replaced_and_when_all_have_there_is_nobody_to_go_on_from() -> None:
    found = heirs([part(n, None if n in (2, 5) else n / 10) for n in range(8)])
    assert {heir.member for heir in found if heir.parent != heir.member} == {0, 1, 2, 5}
    assert all(heir.parent in (6, 7) for heir in found if heir.member in (0, 1, 2, 5))
    assert heirs([part(n, None) for n in range(8)]) == []


@given(st.integers(0, 10_000), st.floats(1e-5, 1e-3), st.integers(0, 4), st.sampled_from([16, 32]))
def test_changed_values_stay_in_the_space(seed: int, rate: float, smoothing: int, batch_size: int) -> None:
    space = space_of(PLAIN)
    point = {
        "training.learning_rate": rate, "training.warmup_fraction": 0.1,
        "training.label_smoothing": smoothing * 0.1, "training.batch_size": batch_size,
    }  # fmt: skip
    for _ in range(5):
        point = explored(point, space, random.Random(seed))
        assert space.contains(point), point


def test_a_field_comes_into_a_changed_point_with_the_one_it_depends_on() -> None:
    space = space_of({
        "training.focal_gamma": [0.0, 2.0],
        "training.label_smoothing": {"uniform": [0.0, 0.3], "when": {"training.focal_gamma": 0.0}},
    })  # fmt: skip
    found = [explored({"training.focal_gamma": 2.0}, space, random.Random(seed)) for seed in range(40)]
    assert all(space.contains(point) for point in found)
    assert {len(point) for point in found} == {1, 2}


def test_a_population_that_was_ended_goes_on_where_it_was_and_keeps_what_heirs_need(tmp_path: Path) -> None:
    def opened() -> Study:
        return Study(f"sqlite:///{tmp_path}/s.db", "s", Tuning(trials=4, scheduler="pbt"), SPACE, ["loss"], seed=17)

    def end(asked: Asked) -> None:
        study.report(asked.number, asked.generation, float(asked.number))
        study.tell(asked.number, Measured("complete", {"loss": float(asked.number)}, epochs=1))

    study = opened()
    for _ in range(4):
        end(study.following(4, 3))
    heir = study.following(4, 3)
    assert heir is not None and (heir.generation, heir.parent) == (1, 0)
    study = opened()  # the driver was killed
    assert study.unfinished() == [heir], "it is the same part of the same line"
    assert study.ancestors(3) == set(range(5))
    asked: Asked | None = heir
    while asked is not None:
        end(asked)
        study = opened()
        asked = study.following(4, 3)
    assert [(p.member, p.generation) for p in study.parts()] == [(m, g) for g in range(3) for m in range(4)]
    assert study.ancestors(3) == set(), "nobody comes after the last generation"


def test_a_run_that_is_handed_on_has_its_parents_past_and_may_be_handed_on_again_after_a_kill(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with storage.publish("parent/model") as folder:
        (folder / "weights").write_bytes(b"best")
    storage.path("parent/metrics.jsonl").write_text('{"step": 8}')
    position = Position(epoch=2, step=8, best_epoch=1, finished=True, stopped_early=True)
    save_state(storage, "parent", position, {"network": {"w": torch.ones(3)}})
    inherit(storage, "parent", "heir")
    storage.remove("heir/checkpoints")  # as when it was killed before the last thing that is written
    for _ in range(2):
        inherit(storage, "parent", "heir")
    found, folder = latest_state(storage, "heir")
    assert found == replace(position, finished=False, stopped_early=False) and folder is not None
    assert torch.equal(load_tensors(folder)["network"]["w"], torch.ones(3))
    assert (storage.fetch("heir/best/epoch-00001") / "weights").read_bytes() == b"best"
    assert storage.path("heir/metrics.jsonl").read_text() == '{"step": 8}'
    with pytest.raises(IntegrityError, match="the checkpoints of nobody are gone"):
        inherit(storage, "nobody", "another")


POPULATION = "trials: 4, scheduler: pbt, objectives: {minimize: loss}"
RATE = "training.learning_rate: {log_uniform: [1.0e-5, 1.0e-2]}, training.weight_decay: {uniform: [0.0, 0.1]}"


@pytest.mark.ray
@pytest.mark.parametrize("beside", [(), pytest.param((("two", 2),), marks=pytest.mark.slow)], ids=["alone", "compared"])
def test_a_population_is_the_same_whatever_goes_on_at_a_time_and_whoever_is_killed(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session, beside: tuple[tuple[str, int], ...]
) -> None:
    records, studies, killed = {}, {}, list[int]()

    def kill_an_heir(event: object) -> None:
        running = str(getattr(event, "figures", {}).get("running", ""))
        if "5 (" in running and not killed:
            killed.append(kill_trial())

    for name, concurrency in (("one", 1), *beside):
        text = recipe_text(
            reviews_csv, tiny_backbone, tmp_path / name, f"{POPULATION}, concurrency: {concurrency}", "", RATE
        )
        studies[name] = Studying(text.replace("epochs: 3", "epochs: 2"), ray_session)
        if name == "one":
            studies[name].events = _Each(kill_an_heir)
            studies[name].pipeline.report = studies[name].events.append
        records[name] = studies[name].tune()
    assert killed, "an heir was under way"
    assert len(studies["one"].trials()) == 8, "four members, two epochs"
    for name, _ in beside:
        assert sorted(map(_come_out, studies["one"].trials())) == sorted(map(_come_out, studies[name].trials()))
    study, record = studies["one"], records["one"]
    heirs = [trial for trial in study.trials() if trial.parent is not None]
    moved = [t for t in heirs if t.parameters != study.trials()[t.parent or 0].parameters]
    assert len(heirs) == 4 and len(moved) == 1, "one of four is replaced after an epoch"
    for trial in heirs:
        lines = [line for line in read_metrics(study.folder(trial.location) / METRICS) if line["kind"] == "validation"]
        before = read_metrics(study.folder(study.trials()[trial.parent or 0].location) / METRICS)
        past = [line for line in before if line["kind"] == "validation"]
        assert lines[:-1] == past and trial.epochs == 1, "its past is its parent's"
    assert record.epochs == 8
    assert record.winner.metrics["loss"] == min(t.metrics["loss"] for t in study.trials())
    assert any("loaded afresh" in line and "exactly as recorded" in line for line in study.said)
    assert load_model(study.folder(record.model.model_location)).labels == ("bad", "good")
    heavy = [p for kind in (MODEL, CHECKPOINTS) for p in (tmp_path / "one").glob(f"tune/*/{TRIALS}/*/{kind}")]
    assert {path.parent.name for path in heavy} == {str(record.winner.number)}, "the others' weights are collected"


def _come_out(trial: TrialRecord) -> tuple[object, ...]:
    """To rounding: with one trial at a time each has more threads."""
    history = [(epoch, round(value, 4)) for epoch, value in trial.history]
    return trial.state, str(trial.parameters), round(trial.metrics["loss"], 4), history


@pytest.mark.parametrize(
    ("tuning", "training", "space", "rule"),
    [
        (POPULATION, "", "training.batch_size: [8, 16]", "training.batch_size cannot change in the midst of a run"),
        (POPULATION, "folds: 2", RATE, "does not go with training.folds"),
        (POPULATION, "ensemble: 2", RATE, "does not go with training.ensemble"),
        ("trials: 2, scheduler: pbt", "", RATE, "pbt needs trials of at least 4, its population"),
        ("scheduler: pbt, objectives: {maximize: macro_f1, minimize: seconds}", "", RATE, "by one objective"),
    ],
)
def test_what_no_population_can_do_is_refused_before_the_data_is_read(
    tiny_backbone: Path, tmp_path: Path, tuning: str, training: str, space: str, rule: str
) -> None:
    with pytest.raises(RecipeError, match=rule):
        Studying(recipe_text(tmp_path / "none.csv", tiny_backbone, tmp_path, tuning, training, space), None).tune()
