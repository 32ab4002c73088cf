"""The study's page: it holds what was tried, for one trial and a thousand, and runs nothing that a user's data says."""

import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from spaces import PLAIN, space_of

from orchestrator.recipe_tuning import Bound, Tuning
from orchestrator.records import EpochMetrics, ModelRecord, StudyRecord, TrialRecord
from orchestrator.tuning.outcome import candidates, choose_winner, front, importances, is_inside
from orchestrator.tuning.report import told, write_report
from orchestrator.tuning.space import Space

HOSTILE = "<script>alert('x')</script>" + "very long " * 60


def a_trial(number: int, space: Space, generator: random.Random, objectives: tuple[str, ...]) -> TrialRecord:
    point = {}
    for p in space.parameters:
        if p.counts(point):
            values = p.dimension.values
            drawn = generator.choice(values) if p.dimension.kind == "choice" else generator.uniform(*values[:2])
            point[p.path] = values[0] if p.dimension.kind == "quantized" else drawn
    if generator.random() < 0.1 and number:
        return TrialRecord(number=number, state="failed", parameters=point, error=HOSTILE, kind="out_of_memory")
    stopped, curve = generator.random() < 0.4, generator.uniform(0.5, 0.9)
    epochs = 1 if stopped else 3
    history = tuple((e, curve * (1 - 0.3**e)) for e in range(1, epochs + (epochs == 1)))
    metrics = dict.fromkeys(objectives, curve) | {"macro_f1": curve, "loss": 1 - curve, "seconds": 40.0 * epochs}
    metrics |= {"latency_ms": generator.uniform(3, 20), "size_mb": 90.0}
    return TrialRecord(
        number=number, state="pruned" if stopped else "complete", parameters=point, metrics=metrics, epochs=epochs,
        history=history if len(objectives) == 1 else (), seconds=41.0 * epochs, is_default=number == 0,
        violations=(metrics["latency_ms"] / 15 - 1,),
    )  # fmt: skip


def a_study(
    count: int, space: Space, objectives: tuple[str, ...] = ("macro_f1",), tuning: Tuning | None = None
) -> tuple[StudyRecord, list[TrialRecord]]:
    generator = random.Random(count)
    trials = [a_trial(n, space, generator, objectives) for n in range(count)]
    if tuning is None:
        trials = [trial.model_copy(update={"violations": ()}) for trial in trials]
    up = tuple(o == "macro_f1" for o in objectives)
    winner = choose_winner(trials, objectives, up, tuning or Tuning())
    epoch = EpochMetrics(epoch=0, step=1, train_loss=0.1, validation={}, learning_rate=1e-4, samples_per_s=1.0)
    model = ModelRecord(
        name="m", key="k" * 64, location="tune/x/trials/0", model_location="tune/x/trials/0/model", task="t", backbone="b",
        dataset="d" * 64, epochs=(epoch,), best_epoch=0, best_metric="macro_f1", best_value=0.9, steps=1, workers=1,
        device="cpu", precision="fp32", parameters=1, size_bytes=1, seconds=1.0, samples_per_s=1.0,
    )  # fmt: skip
    record = StudyRecord(
        name=HOSTILE[:27], key="k", location="tune/x", study="reviews-0123", objectives=objectives, maximized=up,
        trials=count, complete=sum(t.state == "complete" for t in trials), pruned=sum(t.state == "pruned" for t in trials),
        failed=sum(t.state == "failed" for t in trials), winner=winner, default=trials[0], noise=0.02,
        pareto=front([t for t in candidates(trials, objectives) if is_inside(t)], objectives, up), within_noise=3,
        optimism=0.013, importances=importances(trials, space, objectives[0], maximized=up[0]),
        epochs=sum(t.epochs for t in trials), seconds=9000.0, report="tune/x/report.html", model=model,
    )  # fmt: skip
    return record, trials


CONDITIONAL = {
    "training.learning_rate": {"log_uniform": [1e-5, 1e-3]},
    "model.backbone": ["/models/a-small-one", "/models/another", HOSTILE],
    "training.batch_size": [16, 32],
    "training.layer_decay": {"uniform": [0.5, 0.9], "when": {"model.backbone": ["/models/another"]}},
}
LIMITED = Tuning(constraints={"latency_ms": Bound(at_most=15.0)})


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)


@pytest.mark.parametrize("count", [1, 3, 24, 1000])
@pytest.mark.parametrize("objectives", [("macro_f1",), ("loss",), ("macro_f1", "latency_ms")], ids=" ".join)
def test_the_page_is_whole_and_harmless(tmp_path: Path, count: int, objectives: tuple[str, ...]) -> None:
    space = space_of(CONDITIONAL)
    study, trials = a_study(count, space, objectives, LIMITED)
    write_report(tmp_path / "report.html", study, trials, LIMITED, space)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and not re.search(r"(?:src|href)=\"https?:", text)
    assert page.tags.count("tr") < 350 and len(text) < 6_000_000
    assert f"trial {study.winner.number}" in text and "at most 15" in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "no plot uses the parts of another"
    assert ("Pareto front" in text) == (len(objectives) > 1)
    if count > 200:
        assert "The 200 best of 1000" in text


def test_a_study_of_which_one_trial_is_left_says_what_failed(tmp_path: Path) -> None:
    space = space_of(PLAIN)
    study, trials = a_study(2, space)
    lost = [TrialRecord(number=n, state="failed", parameters={}, error="no room\nmore", kind="lost") for n in (2, 3, 4)]
    study = study.model_copy(update={"default": None, "noise": None})
    write_report(tmp_path / "report.html", study, [*trials, *lost], Tuning(), space)
    text = (tmp_path / "report.html").read_text()
    assert "3: 2, 3, 4" in text and "no room</td>" in text and "Too few different trials" in text


def test_values_are_short() -> None:
    assert [told(v) for v in (3.00000004e-5, 22_713_216.0, "/models/a", 16, None)] == [
        "3e-05", "22,713,216", "a", "16", "None",
    ]  # fmt: skip
    assert len(told("x" * 1000)) == 160
