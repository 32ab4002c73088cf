"""The compress stage: what is chosen keeps the limits and is a model as any other; what cannot be is said at once."""

import os
import re
import signal
import threading
from pathlib import Path

import pytest
from compressing import Compressing, recipe_text
from processes import descendants

from orchestrator.errors import CompressionFailed, RecipeError
from orchestrator.models.checkpoint import load_model
from orchestrator.records import ModelRecord
from orchestrator.session import Session
from orchestrator.storage import RECORD

pytestmark = pytest.mark.ray


def test_a_sweep_ends_in_a_smaller_model_that_keeps_the_limits_and_walks_on(
    reviews_csv: Path, tiny_backbone: Path, storage: Path, ray_session: Session
) -> None:
    forms = "[onnxruntime-int8, onnxruntime-fp32, torch-fp32, onnxruntime-int8-static]"
    asked = (
        f"trials: 3, layers: 0.5, vocabulary: 0.9, space: {{compression.form: {forms}}}, limits: {{macro_f1_drop: 0.2}}"
    )
    text = recipe_text(reviews_csv, tiny_backbone, storage, asked)
    run = Compressing(text, ray_session)
    record = run.compress()
    assert record.trials == 3 and record.failed == 0
    assert record.winner.metrics["macro_f1"] >= record.before["macro_f1"] - 0.2
    parent = run.pipeline.walk("train")
    assert isinstance(parent, ModelRecord) and record.model.parameters < parent.parameters
    assert record.model.form == record.winner.parameters["compression.form"]
    assert record.model.parent == record.parent
    assert len(record.refused) == 2 and record.winner.number not in record.refused
    assert load_model(run.folder(record.model.model_location)).labels == ("bad", "good")
    assert "unchanged, taken from before" in run.said, "the model was trained before"
    recoveries = list(storage.glob("compress/*/trials/*/recovery/*/metrics.jsonl"))
    assert len(recoveries) == 1, "candidates that differ in their form alone share one student"
    page = run.folder(record.report).read_text()
    assert "All candidates" in page and all(f"<td>{number}</td>" in page for number in record.refused)

    evaluation = run.pipeline.walk("evaluate")
    assert evaluation.model == record.model.key and evaluation.metrics["accuracy"].value > 0.6

    again = Compressing(text, None)  # without Ray: nothing is left to do
    assert again.compress() == record and "unchanged, taken from before" in again.said


def test_limits_that_nobody_keeps_end_with_the_nearest_and_what_would_do(
    reviews_csv: Path, tiny_backbone: Path, storage: Path, ray_session: Session
) -> None:
    asked = "trials: 1, form: torch-fp32, space: {compression.form: [torch-fp32]}, limits: {size_bytes: 1000}"
    text = recipe_text(reviews_csv, tiny_backbone, storage, asked)
    with pytest.raises(
        CompressionFailed, match=r"none of 1 candidates keeps compression\.limits; the nearest are"
    ) as no:
        Compressing(text, ray_session).compress()
    wanted = re.search(r"size_bytes: ([0-9.e+]+)", str(no.value))
    assert wanted and float(wanted[1]) > 1000


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("trials: 1, space: {compression.filters: [0.5]}", "compression.filters does not apply"),
        ("trials: 1, filters: 0.5", "compression.filters does not apply"),
    ],
)
def test_what_does_not_apply_is_said_before_any_candidate(
    asked: str, told: str, reviews_csv: Path, tiny_backbone: Path, storage: Path, ray_session: Session
) -> None:
    text = recipe_text(reviews_csv, tiny_backbone, storage, asked)
    with pytest.raises(RecipeError, match=told):
        Compressing(text, ray_session).compress()
    assert not list(storage.glob("compress/*/trials/*"))


@pytest.mark.slow
def test_a_candidate_whose_process_dies_costs_that_candidate_alone(
    reviews_csv: Path, tiny_backbone: Path, storage: Path, ray_session: Session
) -> None:
    space = "{compression.form: [torch-fp32, onnxruntime-fp32]}"
    text = recipe_text(
        reviews_csv, tiny_backbone, storage, f"trials: 2, space: {space}, limits: {{macro_f1_drop: 1.0}}"
    )
    run = Compressing(text, ray_session)
    running, killed, over = [""], list[int](), threading.Event()

    def see(event: object) -> None:
        running[0] = str(getattr(event, "figures", {}).get("running", running[0]))

    def kill_the_first() -> None:
        while len(killed) < 2 and not over.wait(0.5):
            killed.extend(kill_candidate() if running[0] == "0" else [])

    run.pipeline.report = see
    killer = threading.Thread(target=kill_the_first)
    killer.start()
    try:
        record = run.compress()
    finally:
        over.set()
        killer.join()
    assert len(killed) == 2
    assert record.failed == 1 and record.complete == 1
    assert "died" in record.refused[0] or "lost" in record.refused[0] or "killed" in record.refused[0].lower()
    assert record.winner.number != 0


def kill_candidate() -> list[int]:
    """SIGKILL to the process that makes candidates, if it is there; returns its pid."""
    for pid in descendants(os.getpid()):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::ResourceTrainable.train"):  # Tune's name for it, while it makes one
            os.kill(pid, signal.SIGKILL)
            return [pid]
    return []


@pytest.mark.slow
def test_a_record_that_is_lost_is_made_again_from_what_the_study_knows(
    reviews_csv: Path, tiny_backbone: Path, storage: Path, ray_session: Session
) -> None:
    asked = (
        "trials: 1, form: onnxruntime-fp32, space: {compression.form: [onnxruntime-fp32]}, limits: {macro_f1_drop: 1.0}"
    )
    text = recipe_text(reviews_csv, tiny_backbone, storage, asked)
    record = Compressing(text, ray_session).compress()
    run = Compressing(text, ray_session)
    run.folder(f"{record.location}/{RECORD}").unlink()
    remade = run.compress()
    assert remade.winner.parameters == record.winner.parameters and remade.model.key == record.model.key
    assert not any("candidate 0:" in line for line in run.said), "it was not measured anew in the sweep"
