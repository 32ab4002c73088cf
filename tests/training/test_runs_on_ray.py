"""Several runs side by side on Ray: folds and ensembles, through faults, to the model that is evaluated and served."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from running import ancestors, last_step, lines_of, training_processes

from orchestrator.errors import TrainingFailed
from orchestrator.models.backbones import EnsembleNetwork
from orchestrator.models.checkpoint import load_model
from orchestrator.pipeline import Pipeline
from orchestrator.progress import Event
from orchestrator.recipe import Recipe
from orchestrator.recipe_file import parse_recipe
from orchestrator.records import ModelRecord, VersionRecord
from orchestrator.serving.predictor import Predictor
from orchestrator.session import Session
from orchestrator.storage import METRICS, Storage, sha256_file
from orchestrator.training.state import latest_state

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent.parent
STEPS = 6 * 27
"""Of each fold: epochs of 240 or 241 rows in batches of 9."""
FOLDS = "epochs: 6, batch_size: 9, learning_rate: 2.0e-3, checkpoint_every_steps: 15, folds: 3, ensemble: folds"


def recipe_text(reviews: Path, backbone: Path, storage: Path, training: str) -> str:
    return (
        f"name: r\ntask: text_classification\nstorage: {storage}\ndata: {{source: {reviews}}}\n"
        f"model: {{backbone: {backbone}, max_tokens: 32}}\ntraining: {{{training}}}\n"
        "evaluation: {bootstrap_samples: 100}\n"
    )


def pipeline_of(recipe: Recipe, session: Session, events: list[Event] | None = None) -> Pipeline:
    """A pipeline on the Ray instance that all tests share."""
    pipeline = Pipeline(recipe, report=(events if events is not None else []).append)
    pipeline.session = session  # type: ignore[misc]
    return pipeline


def weights(recipe: Recipe, record: ModelRecord) -> list[str]:
    """SHA-256 of the weights of each fold's run, then of each member of the model."""
    storage = Storage(recipe.storage)
    runs, model = storage.path(record.location) / "folds", storage.path(record.model_location) / "members"
    files = [*sorted(runs.glob("*/model/model.safetensors")), *sorted(model.glob("*/model.safetensors"))]
    assert len(files) == 6
    return [sha256_file(file) for file in files]


@pytest.fixture(scope="module")
def untouched(
    reviews_csv: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: Session
) -> tuple[list[str], ModelRecord]:
    """Weights and record of the run that nobody touched."""
    folder = tmp_path_factory.mktemp("untouched")
    recipe = parse_recipe(recipe_text(reviews_csv, tiny_backbone, folder, FOLDS))
    pipeline = pipeline_of(recipe, ray_session)
    record = pipeline.train(pipeline.prepare())
    return weights(recipe, record), record


def test_the_folds_validate_every_row_once_and_become_one_model(untouched: tuple[list[str], ModelRecord]) -> None:
    hashes, record = untouched
    assert record.folds is not None and record.ensemble is not None
    assert hashes[:3] == hashes[3:], "the members are the folds' models"
    assert len(set(hashes)) == 3
    assert sum(run.rows for run in record.folds.runs) == 361
    values = [run.validation["macro_f1"] for run in record.folds.runs]
    assert record.folds.mean["macro_f1"] == pytest.approx(sum(values) / 3) and min(values) > 0.8
    assert record.folds.deviation["macro_f1"] > 0.0
    assert record.best_value == record.folds.mean["macro_f1"]
    assert record.ensemble.members == record.folds.runs
    assert record.ensemble.disagreement is None, "no validation row is new to all members"
    assert record.steps == 3 * STEPS and record.workers == 1


@pytest.mark.slow
def test_a_fold_whose_worker_is_killed_goes_on_and_all_members_have_the_same_weights(
    untouched: tuple[list[str], ModelRecord],
    reviews_csv: Path,
    tiny_backbone: Path,
    tmp_path: Path,
    ray_session: Session,
) -> None:
    recipe, events = parse_recipe(recipe_text(reviews_csv, tiny_backbone, tmp_path, FOLDS)), list[Event]()
    pipeline = pipeline_of(recipe, ray_session, events)
    dataset, number = pipeline.prepare(), random.SystemRandom().randrange(3)
    run = Path(untouched[1].location) / "folds" / str(number)
    at_step = random.SystemRandom().randint(16, STEPS - 90)
    killed: list[tuple[int, int]] = []

    def kill() -> None:
        while last_step(tmp_path / run) < at_step:
            time.sleep(0.005)
        pid = writer_of(tmp_path / run / METRICS)
        os.kill(pid, signal.SIGKILL)
        killed.append((pid, last_step(tmp_path / run)))

    threading.Thread(target=kill, daemon=True).start()
    record = pipeline.train(dataset)
    ((pid, step),) = killed
    assert at_step <= step < STEPS and not Path(f"/proc/{pid}").exists(), "the fault fired, in the midst of training"
    resumed = [latest_state(Storage(recipe.storage), f"{record.location}/folds/{i}")[0].resumed for i in range(3)]
    assert resumed == [int(i == number) for i in range(3)], "it hit this fold's run and no other"
    assert weights(recipe, record) == untouched[0], f"killed at step {step} of fold {number}"
    assert [line["step"] for line in lines_of(tmp_path / run, "train")] == list(range(1, STEPS + 1))
    assert any(event.message.startswith(f"fold {number + 1}/3: worker 0 was lost") for event in events)


def writer_of(file: Path) -> int:
    """The training process that has this file open."""
    for pid in training_processes():
        links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
        if str(file) in links:
            return pid
    raise AssertionError(f"nobody writes {file}")


@pytest.mark.slow
def test_ctrl_c_ends_all_runs_and_the_same_command_does_only_what_is_missing(
    untouched: tuple[list[str], ModelRecord], reviews_csv: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    recipe_file, storage = tmp_path / "recipe.yaml", tmp_path / "runs"
    recipe_file.write_text(recipe_text(reviews_csv, tiny_backbone, storage, FOLDS))
    folds = storage / untouched[1].location / "folds"
    command = [sys.executable, "-m", "orchestrator.cli", "train", str(recipe_file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not any((folds / str(i) / "record.json").exists() for i in range(3)) or last_step(folds / "2") < 20:
        assert first.poll() is None, first.stderr and first.stderr.read()
        time.sleep(0.01)
    mine = [pid for pid in training_processes() if first.pid in ancestors_of(pid)]
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=120)
    assert (first.returncode, said.splitlines()[-1]) == (130, "error: interrupted; the same command goes on from here")
    assert "Traceback" not in said
    assert mine and wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in mine)), "no worker is left"
    finished = {file: file.stat().st_mtime_ns for file in folds.glob("*/record.json")}
    assert 0 < len(finished) < 3, "stopped when some folds were finished and some were not"

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert f"{3 - len(finished)} of 3 runs to do" in again.stderr
    assert {file: file.stat().st_mtime_ns for file in finished} == finished, "finished folds are not done again"
    assert [last_step(folds / str(i)) for i in range(3)] == [STEPS] * 3
    hashes = [sha256_file(folds / str(i) / "model" / "model.safetensors") for i in range(3)]
    assert hashes == untouched[0][:3]
    assert "fold 3" in again.stdout and "deviation" in again.stdout


def ancestors_of(pid: int) -> list[int]:
    try:
        return ancestors(pid)
    except OSError:  # it has ended meanwhile
        return []


def wait_until(fact: object, patience_s: float = 60.0) -> bool:
    ends = time.monotonic() + patience_s
    while not fact():  # type: ignore[operator]
        if time.monotonic() > ends:
            return False
        time.sleep(0.1)
    return True


def test_an_ensemble_goes_the_whole_path_as_one_model(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    training = "epochs: 3, batch_size: 8, learning_rate: 2.0e-3, ensemble: 2"
    recipe = parse_recipe(recipe_text(reviews_csv, tiny_backbone, tmp_path, training))
    pipeline = pipeline_of(recipe, ray_session)
    dataset = pipeline.prepare()
    model = pipeline.train(dataset)
    assert model.ensemble is not None and model.ensemble.disagreement is not None and model.folds is None
    assert model.best_value == model.ensemble.validation["macro_f1"]  # type: ignore[index]
    assert 0.0 <= model.ensemble.disagreement.labels < 0.5
    assert 0.0 < model.ensemble.disagreement.mutual_information < model.ensemble.disagreement.predictive_entropy
    assert model.steps == 3 * 40 * 2

    evaluation = pipeline.evaluate(model, dataset)
    assert evaluation.metrics["accuracy"].value > 0.8
    page = (tmp_path / evaluation.report).read_text()
    assert "<h2>Ensemble</h2>" in page and "together" in page
    version = pipeline.promote(model, dataset, evaluation)
    assert isinstance(version, VersionRecord)
    folder = pipeline.registry.open(version) / "model"  # verified, the members' files too
    predictor = Predictor(load_model(folder, verify=False))
    assert isinstance(predictor.model.network, EnsembleNetwork)
    predictor.warm_up()
    told = predictor.predict(["a great fresh tasty cup", "stale awful burnt coffee"])
    labels = [predictor.answer(prediction)["label"] for prediction in told]
    assert labels == ["good", "bad"]
    alone = [load_model(folder / "members" / str(i)) for i in range(2)]
    first = [Predictor(member).predict(["a great fresh tasty cup"])[0].probabilities or [] for member in alone]
    assert told[0].probabilities == pytest.approx([sum(column) / 2 for column in zip(*first, strict=True)], abs=1e-6)
    assert len({tuple(values) for values in first}) == 2, "each member from a seed of its own"


@pytest.mark.slow
def test_the_error_of_one_run_is_the_error_and_the_runs_under_way_are_finished(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    training = "epochs: 2, batch_size: 8, learning_rate: 2.0e-3, ensemble: 4"
    recipe, events = parse_recipe(recipe_text(reviews_csv, tiny_backbone, tmp_path, training)), list[Event]()
    pipeline = pipeline_of(recipe, ray_session, events)
    dataset = pipeline.prepare()

    def break_second() -> None:
        """A folder where the second member's log should be: its worker cannot write."""
        while not (found := list((tmp_path / "train").glob("r-*"))):
            time.sleep(0.005)
        (found[0] / "members" / "1" / METRICS).mkdir(parents=True)

    threading.Thread(target=break_second, daemon=True).start()
    with pytest.raises(TrainingFailed, match="training raised on worker 0: .*IsADirectoryError"):
        pipeline.train(dataset)
    (folder,) = (tmp_path / "train").glob("r-*")
    assert (folder / "members" / "0" / "record.json").exists()
    assert not (folder / "members" / "3").exists(), "no other was started"
