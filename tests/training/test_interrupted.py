"""`orchestrator train`, killed or interrupted at any moment and repeated, goes on as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import descendants, wait_for_end
from running import last_step, lines_of, recipe_text, training_processes

from orchestrator.storage import sha256_file

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent.parent
EPOCHS = 15
STEPS = EPOCHS * 40
"""Many more than are done until the second interruption: workers go on for seconds after their command has died."""


def start(recipe: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "orchestrator.cli", "train", str(recipe), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    record: dict[str, object] = json.loads(out.splitlines()[-1])
    return record


def reached(storage: Path) -> int:
    return max((last_step(run) for run in storage.glob("train/*")), default=0)


def interrupt(recipe: Path, storage: Path, how: signal.Signals) -> tuple[int, str, set[int]]:
    """Train on, and send the signal to the command when it has passed two more checkpoints, which are written behind the
    steps that follow. Returns its exit status, its last words and the processes that it had."""
    at_step = reached(storage) + random.SystemRandom().randint(35, 45)
    process = start(recipe)
    while reached(storage) < at_step:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)
    family = descendants(process.pid)
    workers = family & set(training_processes())
    assert workers, "it trains"
    process.send_signal(how)
    said = process.communicate(timeout=120)[1]
    assert reached(storage) < STEPS, "the fault fired in the midst of training"
    wait_for_end(workers, timeout_s=120)
    return process.returncode, said, family


def test_training_killed_and_interrupted_ends_with_the_weights_of_the_run_nobody_touched(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    recipe, storage, families = tmp_path / "recipe.yaml", tmp_path / "runs", set[int]()
    recipe.write_text(recipe_text(reviews_csv, tiny_backbone, storage, "workers: 1", EPOCHS))
    whole = tmp_path / "whole.yaml"
    whole.write_text(recipe_text(reviews_csv, tiny_backbone, tmp_path / "whole", "workers: 1", EPOCHS))
    untouched = finish(start(whole))
    assert untouched["resumed"] == 0
    for how, status in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):  # SIGTERM: tests/test_stopped.py
        returned, said, family = interrupt(recipe, storage, how)
        families |= family
        assert returned == status, said
    assert said.splitlines()[-1] == "error: interrupted; the same command goes on from here"
    assert "Traceback" not in said
    record = finish(start(recipe))
    assert record["resumed"] == 2
    assert sha256_file(storage / str(record["model_location"]) / "model.safetensors") == sha256_file(
        tmp_path / "whole" / str(untouched["model_location"]) / "model.safetensors"
    )
    (run,) = storage.glob("train/*")
    assert [line["step"] for line in lines_of(run, "train")] == list(range(1, STEPS + 1))
    wait_for_end(families, timeout_s=120)  # Ray's own agents take their time after a SIGKILL
