"""The page stands alone, shows what it should, and runs nothing that a row of data says."""

import re
from pathlib import Path

import numpy as np
import pytest

from orchestrator.evaluation.report import TestRows, write_report
from orchestrator.evaluation.scores import evaluate_predictions
from orchestrator.present import describe
from orchestrator.records import (
    CleaningCounts,
    CrossValidation,
    DatasetRecord,
    Disagreement,
    Ensemble,
    EpochMetrics,
    EvaluationRecord,
    ModelRecord,
    RunMetrics,
    SplitStats,
)

ATTACK = '<script>alert(1)</script><img src=x onerror="alert(2)">'


def render(path: Path, classes: int, names: tuple[str, ...] | None = None, **changes: object) -> str:
    generator = np.random.default_rng(0)
    names = names or tuple(f"class {c}" for c in range(classes))
    labels = np.concatenate([np.arange(classes), generator.integers(0, classes, 300)])
    logits = generator.normal(size=(len(labels), classes)) + 2 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = evaluate_predictions(labels, probabilities, names, samples=100, confidence=0.95, seed=0)
    counts = dict.fromkeys(names, 30)
    splits = {s: SplitStats(rows=300, class_counts=counts) for s in ("train", "validation", "test")}
    dataset = DatasetRecord(
        name="demo", key="d" * 64, location="prepare/demo", task="text_classification", input_kind="text",
        input_column="text", label_column="label", labels=names, splits=splits, size_bytes=1, seconds=1.0,
        cleaning=CleaningCounts(rows_read=320, kept=300, duplicates=20),
    )  # fmt: skip
    validation = {"loss": 0.5, "accuracy": 0.8, "macro_f1": 0.79, "weighted_f1": 0.8}
    epochs = tuple(EpochMetrics(epoch=i, step=50 * (i + 1), train_loss=0.6 - i / 10, validation=validation,
                                learning_rate=1e-5, samples_per_s=20.0) for i in range(3))  # fmt: skip
    model = ModelRecord(
        name="demo", key="m" * 64, location="train/demo", model_location="train/demo/model", task="text_classification",
        backbone="tiny", dataset="d" * 64, epochs=epochs, best_epoch=2, best_metric="macro_f1", best_value=0.79,
        steps=150, workers=2, device="cpu", precision="fp32", parameters=22_700_000, size_bytes=90_000_000,
        seconds=100.0, samples_per_s=20.0,
    )  # fmt: skip
    model = model.model_copy(update=changes)
    evaluation = EvaluationRecord(
        name="demo", key="e" * 64, location="evaluate/demo", model="m" * 64, dataset="d" * 64, rows=len(labels),
        metrics=scores.metrics, per_class=scores.per_class, confusion=scores.confusion,
        slices={"shop": {ATTACK: {"rows": 10, "accuracy": 0.5, "macro_f1": 0.4}}}, latency_ms_p50=12.3,
        latency_ms_p95=20.0, throughput_per_s=80.0, size_bytes=90_000_000, report="", predictions="", seconds=1.0,
    )  # fmt: skip
    losses = [(i, 0.7 - i / 400 + generator.normal() / 20) for i in range(150)]
    rows = TestRows(labels, probabilities, [f"text {i} {ATTACK}" for i in range(len(labels))])
    write_report(path, evaluation, model, dataset, rows, losses, mistakes=5)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_the_page_stands_alone_and_stays_small(tmp_path: Path, classes: int) -> None:
    page = render(tmp_path / "report.html", classes)
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    assert page.count("<svg") == 4
    assert len(page) < 1_000_000


def test_what_the_data_says_is_shown_and_not_run(tmp_path: Path) -> None:
    page = render(tmp_path / "report.html", 3, (ATTACK, "b", "c"))
    assert 'onerror="' not in page
    assert "&lt;script&gt;" in page


def test_the_page_shows_figures_mistakes_slices_and_lineage(tmp_path: Path) -> None:
    page = render(tmp_path / "report.html", 2)
    for shown in ("macro F1", "12.3 ms", "90.0 MB", "most confident mistakes", "By shop", "20 duplicates", "e" * 64):
        assert shown in page
    assert page.count("text ") >= 5


def test_the_same_evaluation_gives_the_same_page(tmp_path: Path) -> None:
    assert render(tmp_path / "a.html", 2) == render(tmp_path / "b.html", 2)


RUNS = tuple(RunMetrics(location=f"train/r/folds/{i}", rows=40 + i, best_epoch=i, validation={"loss": 0.4, "macro_f1": v})
             for i, v in enumerate((0.811, 0.832)))  # fmt: skip
FOLDS = CrossValidation(runs=RUNS, mean={"loss": 0.4, "macro_f1": 0.8215}, deviation={"loss": 0.0, "macro_f1": 0.0149})
APART = Disagreement(labels=0.125, predictive_entropy=0.6, member_entropy=0.45, mutual_information=0.15)


def test_folds_and_members_are_tables_where_there_are_any(tmp_path: Path) -> None:
    plain = render(tmp_path / "plain.html", 2)
    assert "Cross-validation" not in plain and "Ensemble" not in plain
    ensemble = Ensemble(members=RUNS, validation={"loss": 0.39, "macro_f1": 0.851}, disagreement=APART)
    page = render(tmp_path / "report.html", 2, folds=FOLDS, ensemble=ensemble)
    for shown in (
        "Cross-validation",
        "<td>0.811</td>",
        "standard deviation",
        "<td>0.015</td>",
        "<td>0.851</td>",
        "12.5%",
    ):
        assert shown in page


def test_the_same_tables_are_lines_of_text() -> None:
    ensemble = Ensemble(members=RUNS, validation={"loss": 0.39, "macro_f1": 0.851}, disagreement=APART)
    values = {
        "stage": "train", "backbone": "tiny", "parameters": 1, "size_bytes": 1, "steps": 9, "seconds": 1.0,
        "samples_per_s": 1.0, "workers": 1, "device": "cpu", "precision": "fp32", "stopped_early": False, "best_epoch": 0,
        "best_metric": "macro_f1", "best_value": 0.85, "folds": FOLDS.model_dump(), "ensemble": ensemble.model_dump(),
    }  # fmt: skip
    lines = [line.split() for line in describe(values).splitlines()]
    assert ["folds", "rows", "epoch", "loss", "macro_f1"] in lines
    assert ["fold", "2", "41", "2", "0.4000", "0.8320"] in lines
    assert ["deviation", "0.0000", "0.0149"] in lines
    assert "2 members, each validation macro_f1 0.8110 to 0.8320, together 0.8510" in describe(values)
    assert "on 12.5% of the validation rows" in describe(values)
