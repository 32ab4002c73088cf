"""The tune stage: the winner is the model, nothing is lost, and what cannot be is said at once."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from studying import Studying, recipe_text

from orchestrator.errors import IntegrityError, TuningFailed
from orchestrator.models.checkpoint import load_model
from orchestrator.session import Session
from orchestrator.storage import MODEL, RECORD, TENSORBOARD, TRIALS, sha256_file

pytestmark = pytest.mark.ray


def test_the_winner_is_the_model_and_the_others_leave_no_weights(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    text = recipe_text(reviews_csv, tiny_backbone, tmp_path, "trials: 5")
    study = Studying(text, ray_session)
    record = study.tune()
    trials = study.trials()
    assert [t.number for t in trials] == list(range(5)) and record.trials == 5
    assert record.default is not None and record.default.parameters["training.learning_rate"] == 1e-3
    best = max(t.metrics["macro_f1"] for t in trials)
    assert record.winner.metrics["macro_f1"] == best == record.model.best_value
    assert any("loaded afresh" in line and "exactly as recorded" in line for line in study.said)
    model = study.folder(record.model.model_location)
    assert load_model(model).labels == ("bad", "good")
    others = [path for path in tmp_path.glob(f"tune/*/{TRIALS}/*/{MODEL}") if path != model]
    assert others == [] and list(tmp_path.glob(f"tune/*/{TRIALS}/*/checkpoints")) in (
        [],
        [model.parent / "checkpoints"],
    )
    assert all(list((study.folder(t.location) / TENSORBOARD).iterdir()) for t in trials)

    again = Studying(text, None)  # without Ray: nothing is left to do
    assert again.tune() == record and "unchanged, taken from before" in again.said

    more = Studying(text.replace("trials: 5", "trials: 10000, time_budget_s: 3"), ray_session)
    started = time.monotonic()
    assert 5 < more.tune().trials < 10_000 and time.monotonic() - started < 120, "it goes on until its time is over"
    assert more.trials()[:5] == trials, "those that were there are as they were"
    assert sum("5 are done" in line for line in more.said) == 1


@pytest.mark.slow
def test_the_winners_model_is_made_again_when_it_is_missing_and_refused_when_it_was_changed(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    text = recipe_text(reviews_csv, tiny_backbone, tmp_path, "trials: 2")
    record = Studying(text, ray_session).tune()
    study = Studying(text, ray_session)
    run, model = study.folder(record.model.location), study.folder(record.model.model_location)
    weights = sha256_file(model / "model.safetensors")
    study.folder(f"{record.location}/{RECORD}").unlink()
    for path in run.iterdir():  # as after a kill between the last word of the scheduler and the model
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    remade = study.tune()
    assert sha256_file(model / "model.safetensors") == weights
    assert remade.winner == record.winner
    assert f"training the model of trial {record.winner.number}" in study.said

    study.folder(f"{record.location}/{RECORD}").unlink()
    kept = run / RECORD
    other = re.sub(r'"loss": [\d.]+', '"loss": 9.5', kept.read_text())
    assert other != kept.read_text()
    kept.write_text(other)
    with pytest.raises(IntegrityError, match=r"the winner, trial \d, loaded afresh has loss [\d.]+ instead of 9\.5"):
        study.tune()


def test_a_killed_trial_is_started_again_and_told_as_lost_when_it_always_dies(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    training = "checkpoint_every_s: 0.1, max_failures: 1"
    text = recipe_text(reviews_csv, tiny_backbone, tmp_path, "trials: 3, concurrency: 1", training)
    killed: list[int] = []
    study = Studying(text.replace("epochs: 3", "epochs: 40"), ray_session)

    def kill_the_second(event: object) -> None:
        running = str(getattr(event, "figures", {}).get("running", ""))
        if running.startswith("1 (epoch") and "(epoch 1)" not in running and len(killed) < 2:
            killed.append(kill_trial())

    study.events = _Each(kill_the_second)
    study.pipeline.report = study.events.append
    record = study.tune()
    assert len(killed) == 2
    assert [t.state for t in study.trials()] == ["complete", "failed", "complete"]
    lost = study.trials()[1]
    assert lost.kind == "lost" and "trial 1 failed: " in "\n".join(study.said)
    assert record.failed == 1 and record.winner.number != 1


class _Each(list):
    """A list of events that does something about each."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def append(self, event):
        super().append(event)
        self.act(event)


def kill_trial() -> int:
    """SIGKILL to the process that runs trials; returns its pid."""
    from processes import descendants

    for pid in descendants(os.getpid()):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if title.startswith("ray::") and "_Trial" in title:
            os.kill(pid, signal.SIGKILL)
            return pid
    raise AssertionError("no trial is running")


def test_trials_that_all_fail_end_the_study_with_the_first_error(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    text = recipe_text(
        reviews_csv, tiny_backbone, tmp_path, "trials: 20, default_first: false, scheduler: none",
        "max_rollbacks: 0, max_grad_norm: null, weight_decay: 1.0", "training.learning_rate: {uniform: [9.0, 10.0]}",
    )  # fmt: skip
    study = Studying(text.replace("epochs: 3", "epochs: 30"), ray_session)
    with pytest.raises(TuningFailed, match=r"the loss is .* \(trial \d; 5 of 5 trials failed\): see whether"):
        study.tune()
    assert {t.kind for t in study.trials() if t.state == "failed"} == {"diverged"}


def test_a_study_of_folds_has_the_mean_as_its_objective(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    text = recipe_text(reviews_csv, tiny_backbone, tmp_path, "trials: 3, scheduler: none", "folds: 2")
    study = Studying(text, ray_session)
    record = study.tune()
    assert record.model.folds is not None and len(record.model.folds.runs) == 2
    assert record.winner.metrics["macro_f1"] == pytest.approx(record.model.folds.mean["macro_f1"])
    assert record.winner.epochs == 6 and record.noise is not None
    assert load_model(study.folder(record.model.model_location)).labels == ("bad", "good")


def test_several_objectives_give_a_front_and_constraints_bind_the_winner_and_the_backbone_can_be_searched(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    other = tmp_path / "other-bert"
    shutil.copytree(tiny_backbone, other)
    space = (
        f"model.backbone: [{tiny_backbone}, {other}], model.max_tokens: {{int: [16, 32]}}, "
        f"training.layer_decay: {{uniform: [0.5, 0.9], when: {{model.backbone: {other}}}}}"
    )
    tuning = (
        f"trials: 4, start: [{{model.backbone: {other}}}], objectives: {{maximize: macro_f1, minimize: seconds}}, "
        "constraints: {latency_ms: {at_most: 10000}}"
    )
    study = Studying(recipe_text(reviews_csv, tiny_backbone, tmp_path, tuning, "", space), ray_session)
    record, trials = study.tune(), study.trials()
    assert record.objectives == ("macro_f1", "seconds") and record.maximized == (True, False)
    assert record.winner.number in record.pareto and record.winner.metrics["latency_ms"] > 0
    kept = {int(path.parent.name) for path in tmp_path.glob(f"tune/*/{TRIALS}/*/{MODEL}")}
    assert kept == set(record.pareto)
    assert {t.parameters["model.backbone"] for t in trials} == {str(tiny_backbone), str(other)}
    assert all(
        ("training.layer_decay" in t.parameters) == (t.parameters["model.backbone"] == str(other)) for t in trials
    )
    assert record.model.backbone == record.winner.parameters["model.backbone"]

    none = Studying(recipe_text(reviews_csv, tiny_backbone, tmp_path / "none",
                                "trials: 2, constraints: {size_mb: {at_most: 0.001}}"), ray_session)  # fmt: skip
    with pytest.raises(
        TuningFailed, match=r"none of 2 trials keeps within .*size_mb at most 0.001.*the nearest is trial"
    ):
        none.tune()


def test_a_trial_of_two_workers_has_a_model(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    study = Studying(recipe_text(reviews_csv, tiny_backbone, tmp_path, "trials: 1", "workers: 2"), ray_session)
    record = study.tune()
    assert record.model.workers == 2 and any("2 workers each" in line for line in study.said)
    assert load_model(study.folder(record.model.model_location)).labels == ("bad", "good")


@pytest.mark.slow
def test_a_study_waits_for_a_busy_cluster_with_a_word(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr("orchestrator.tuning.on_ray._PATIENCE_S", 1.0)
    study = Studying(recipe_text(reviews_csv, tiny_backbone, tmp_path, "trials: 1, concurrency: 1"), ray_session)
    study.dataset()

    class Holder:  # here, or Ray would look for this file where the actor runs
        def hold(self) -> None:
            """Returns when it has the room."""

    holder = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(Holder).remote()
    ray.get(holder.hold.remote())
    told = "no trial can begin: something else is using the cluster; see who: ray status, ray list actors"

    def let_go(event: object) -> None:
        if getattr(event, "message", "") == told:
            ray.kill(holder)

    study.events = _Each(let_go)
    study.pipeline.report = study.events.append
    assert study.tune().trials == 1
    assert told in study.said
