"""A study that is killed at any moment, and started again, ends as if it had not been."""

import random
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from processes import start_command
from studying import Studying, recipe_text

from orchestrator.records import StudyRecord, TrialRecord
from orchestrator.session import Session
from orchestrator.storage import STUDIES_DATABASE, sha256_file

pytestmark = pytest.mark.ray
TRIALS = 6


def finish(process: subprocess.Popen[str]) -> StudyRecord:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return StudyRecord.model_validate_json(out.splitlines()[-1])


def begun(study: Studying) -> int:
    """Trials in the database, without opening it for writing."""
    try:
        with sqlite3.connect(f"file:{study.folder(STUDIES_DATABASE)}?mode=ro", uri=True) as database:
            count: int = database.execute("select count(*) from trials").fetchone()[0]
        return count
    except sqlite3.OperationalError:  # it is not there yet
        return 0


def kill_when_begun(recipe: Path, trials: int, study: Studying) -> None:
    """SIGKILL to the command at some moment after its trial of this number has begun."""
    process = start_command("tune", recipe)
    while begun(study) < trials:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.05)
    time.sleep(random.SystemRandom().uniform(0.0, 1.5))
    process.kill()
    process.communicate(timeout=120)
    assert begun(study) < TRIALS, "it was killed in the midst"


def told(trials: list[TrialRecord]) -> list[tuple[object, ...]]:
    """Everything but times and places."""
    return [
        (t.number, t.state, t.parameters, {k: v for k, v in t.metrics.items() if k != "seconds"}, t.history, t.epochs)
        for t in trials
    ]


def test_a_killed_study_ends_as_the_one_nobody_touched(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, ray_session: Session
) -> None:
    tuning = f"trials: {TRIALS}, startup_trials: 3, concurrency: 1, reduction: 2, objectives: {{minimize: loss}}"
    studies = {}
    for name, session in (("whole", ray_session), ("killed", None)):
        text = recipe_text(reviews_csv, tiny_backbone, tmp_path / name, tuning, "best_metric: loss")
        text = text.replace("epochs: 3", "epochs: 8")
        (tmp_path / f"{name}.yaml").write_text(text)
        studies[name] = Studying(text, session)
        studies[name].dataset()
    whole = studies["whole"].tune()
    kill_when_begun(tmp_path / "killed.yaml", 3, studies["killed"])
    record = finish(start_command("tune", tmp_path / "killed.yaml"))
    untouched, killed = (told(studies[name].trials()) for name in ("whole", "killed"))
    assert killed == untouched
    assert {state for _, state, *_ in untouched} == {"complete", "pruned"}, "the scheduler had a say"
    models = (
        studies["whole"].folder(whole.model.model_location),
        studies["killed"].folder(record.model.model_location),
    )
    assert sha256_file(models[0] / "model.safetensors") == sha256_file(models[1] / "model.safetensors")
