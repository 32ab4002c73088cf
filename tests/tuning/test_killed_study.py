"""A study that is killed at any moment, and started again, ends as if it had not been."""

import json
import random
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from processes import descendants, start_command, wait_for_end
from studying import Studying, recipe_text

from orchestrator.records import TrialRecord
from orchestrator.storage import STUDIES_DATABASE, sha256_file

pytestmark = pytest.mark.ray
TRIALS = 8


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    record: dict[str, object] = json.loads(out.splitlines()[-1])
    return record


def begun(study: Studying) -> int:
    """Trials in the database, without opening it for writing."""
    try:
        with sqlite3.connect(f"file:{study.folder(STUDIES_DATABASE)}?mode=ro", uri=True) as database:
            count: int = database.execute("select count(*) from trials").fetchone()[0]
        return count
    except sqlite3.OperationalError:  # it is not there yet
        return 0


def end_when_begun(recipe: Path, trials: int, how: signal.Signals, study: Studying) -> set[int]:
    """A signal to the command at some moment after its trial of this number has begun. Returns the processes it had."""
    process = start_command("tune", recipe)
    while begun(study) < trials:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.05)
    time.sleep(random.SystemRandom().uniform(0.0, 1.5))
    family = descendants(process.pid)
    process.send_signal(how)
    said = process.communicate(timeout=60)[1]
    assert begun(study) < TRIALS, "it was ended in the midst"
    if how is signal.SIGTERM:
        assert (
            said.splitlines()[-1] == "error: terminated; the same command goes on from here" and "Traceback" not in said
        )
    return family


def told(trials: list[TrialRecord]) -> list[tuple[object, ...]]:
    """Everything but times and places."""
    return [
        (t.number, t.state, t.parameters, {k: v for k, v in t.metrics.items() if k != "seconds"}, t.history, t.epochs)
        for t in trials
    ]


def test_a_study_ended_at_three_moments_ends_as_the_one_nobody_touched(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    tuning = f"trials: {TRIALS}, startup_trials: 3, concurrency: 1, reduction: 2, objectives: {{minimize: loss}}"
    studies, records = {}, {}
    for name in ("whole", "killed"):
        text = recipe_text(reviews_csv, tiny_backbone, tmp_path / name, tuning, "best_metric: loss")
        text = text.replace("epochs: 3", "epochs: 12")
        (tmp_path / f"{name}.yaml").write_text(text)
        studies[name] = Studying(text, None)
        studies[name].dataset()
    records["whole"] = finish(start_command("tune", tmp_path / "whole.yaml"))
    families = [
        end_when_begun(tmp_path / "killed.yaml", at, how, studies["killed"])
        for at, how in ((2, signal.SIGKILL), (4, signal.SIGKILL), (6, signal.SIGTERM))
    ]
    records["killed"] = finish(start_command("tune", tmp_path / "killed.yaml"))
    untouched, killed = (told(studies[name].trials()) for name in ("whole", "killed"))
    assert killed == untouched
    assert {state for _, state, *_ in untouched} == {"complete", "pruned"}, "the scheduler had a say"
    weights = [
        sha256_file(studies[name].folder(str(records[name]["model"]["model_location"])) / "model.safetensors")  # type: ignore[index]
        for name in ("whole", "killed")
    ]
    assert weights[0] == weights[1]
    for family in families:  # Ray's own take most of a minute after a SIGKILL: that is why none is sent last
        wait_for_end(family, timeout_s=60)
