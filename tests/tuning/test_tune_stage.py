"""The tune stage: the winner is the model, nothing is lost, and what cannot be is said at once."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from studying import Studying, recipe_text

from orchestrator.errors import IntegrityError, RecipeError, ResourceError, TuningFailed
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

    more = Studying(text.replace("trials: 5", "trials: 7"), ray_session)
    assert more.tune().trials == 7
    assert more.trials()[:5] == trials, "those that were there are as they were"
    assert sum("5 are done" in line for line in more.said) == 1


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


def test_several_objectives_give_a_front_and_constraints_bind_the_winner(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    tuning = (
        "trials: 4, objectives: {maximize: macro_f1, minimize: seconds}, constraints: {latency_ms: {at_most: 10000}}"
    )
    study = Studying(recipe_text(reviews_csv, tiny_backbone, tmp_path, tuning), ray_session)
    record = study.tune()
    assert record.objectives == ("macro_f1", "seconds") and record.maximized == (True, False)
    assert record.winner.number in record.pareto and record.winner.metrics["latency_ms"] > 0
    kept = {int(path.parent.name) for path in tmp_path.glob(f"tune/*/{TRIALS}/*/{MODEL}")}
    assert kept == set(record.pareto)

    none = Studying(recipe_text(reviews_csv, tiny_backbone, tmp_path / "none",
                                "trials: 2, constraints: {size_mb: {at_most: 0.001}}"), ray_session)  # fmt: skip
    with pytest.raises(
        TuningFailed, match=r"none of 2 trials keeps within .*size_mb at most 0.001.*the nearest is trial"
    ):
        none.tune()


def test_trials_of_two_workers_that_are_stopped_early_have_a_model(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    study = Studying(
        recipe_text(reviews_csv, tiny_backbone, tmp_path, "trials: 2, scheduler: median", "workers: 2"), ray_session
    )
    record = study.tune()
    assert record.model.workers == 2 and any("2 workers each" in line for line in study.said)
    assert load_model(study.folder(record.model.model_location)).labels == ("bad", "good")


def test_the_backbone_can_be_searched(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    other = tmp_path / "other-bert"
    shutil.copytree(tiny_backbone, other)
    space = (
        f"model.backbone: [{tiny_backbone}, {other}], model.max_tokens: {{int: [16, 32]}}, "
        f"training.layer_decay: {{uniform: [0.5, 0.9], when: {{model.backbone: {other}}}}}"
    )
    study = Studying(
        recipe_text(
            reviews_csv, tiny_backbone, tmp_path, f"trials: 4, start: [{{model.backbone: {other}}}]", "", space
        ),
        ray_session,
    )
    record = study.tune()
    trials = study.trials()
    assert {t.parameters["model.backbone"] for t in trials} == {str(tiny_backbone), str(other)}
    assert all(
        ("training.layer_decay" in t.parameters) == (t.parameters["model.backbone"] == str(other)) for t in trials
    )
    assert record.model.backbone == record.winner.parameters["model.backbone"]


def test_a_study_goes_on_until_its_time_is_over(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    text = recipe_text(reviews_csv, tiny_backbone, tmp_path, "trials: 10000, time_budget_s: 10")
    started = time.monotonic()
    record = Studying(text, ray_session).tune()
    assert 2 <= record.trials < 10_000 and time.monotonic() - started < 120


def test_a_study_waits_for_a_busy_cluster_with_a_word(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr("orchestrator.tuning.on_ray._PATIENCE_S", 1.0)
    study = Studying(recipe_text(reviews_csv, tiny_backbone, tmp_path, "trials: 1, concurrency: 1"), ray_session)
    study.dataset()
    cpus = ray.cluster_resources()["CPU"]
    holder = ray.remote(num_cpus=cpus)(lambda: time.sleep(10)).remote()
    while ray.available_resources().get("CPU", 0.0) > 0:
        time.sleep(0.1)
    assert study.tune().trials == 1
    assert "no trial can begin: something else is using the cluster; see who: ray status, ray list actors" in study.said
    ray.get(holder)


@pytest.mark.parametrize(
    ("tuning", "training", "told"),
    [
        (
            "concurrency: 512",
            "",
            r"concurrency is 512, which needs 512 .PUs for 1 worker per trial, but the cluster has",
        ),
        ("trials: 2", "workers: 512", "training.workers is 512, but the cluster has"),
        ("trials: 2", "device: cuda", "training.device is cuda, but the cluster has no GPU"),
    ],
)
def test_what_can_never_fit_is_refused_at_once(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session, tuning: str, training: str, told: str
) -> None:
    study = Studying(recipe_text(reviews_csv, tiny_backbone, tmp_path, tuning, training), ray_session)
    study.dataset()
    started = time.monotonic()
    with pytest.raises(ResourceError, match=told):
        study.tune()
    assert time.monotonic() - started < 10 and study.trials() == []


@pytest.mark.parametrize(
    ("tuning", "space", "told"),
    [
        ("trials: 2", "training.learning_rat: [1]", "not a recipe field: did you mean training.learning_rate"),
        ("trials: 2", "training.label_smoothing: {uniform: [0.5, 1.5]}", "1.5 cannot be"),
        ("trials: 2", "data.max_rows: [100, 200]", "cannot be searched"),
        ("trials: 2, start: [{training.batch_size: 7}]", "training.batch_size: [8, 16]", "start, point 1.*outside of"),
        ("sampler: grid", "training.label_smoothing: {uniform: [0, 0.5]}", "no end of values"),
    ],
)
def test_a_space_that_does_not_fit_is_refused_before_the_data_is_read(
    tiny_backbone: Path, tmp_path: Path, tuning: str, space: str, told: str
) -> None:
    text = recipe_text(tmp_path / "there is none.csv", tiny_backbone, tmp_path, tuning, "", space)
    with pytest.raises(RecipeError, match=told):
        Studying(text, None).tune()
