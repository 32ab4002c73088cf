"""A compression that is killed while it trains, and asked for more when it is started again, tries every candidate once."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compressing import recipe_text
from processes import descendants, start_command, wait_for_end

from orchestrator.storage import RECORD, STUDIES_DATABASE, SURVEY

pytestmark = pytest.mark.ray
CANDIDATES = 4


def done(storage: Path) -> dict[int, dict[str, Any]]:
    """Candidates that the database knows the figures of."""
    query = (
        "select t.number, a.key, a.value_json from trials t join trial_user_attributes a using (trial_id)"
        " where t.state = 'COMPLETE'"
    )
    try:
        with sqlite3.connect(f"file:{storage / STUDIES_DATABASE}?mode=ro", uri=True) as database:
            rows = database.execute(query).fetchall()
    except sqlite3.OperationalError:  # it is not there yet
        return {}
    found: dict[int, dict[str, Any]] = {}
    for number, key, value in rows:
        found.setdefault(number, {})[key] = json.loads(value)
    return found


def kill_when(recipe: Path, there: Callable[[], bool]) -> set[int]:
    """SIGKILL to the command when this is so. Returns the processes it had."""
    process = start_command("compress", recipe)
    while not there():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.05)
    family = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    return family


def test_a_compression_killed_while_a_student_trains_goes_on(
    reviews_csv: Path, tiny_backbone: Path, storage: Path, tmp_path: Path
) -> None:
    space = "{compression.layers: [0.5, 1.0], compression.form: [torch-fp32, onnxruntime-fp32]}"
    asked = f"trials: {CANDIDATES}, space: {space}, sampler: grid, limits: {{macro_f1_drop: 1.0}}"
    text = recipe_text(reviews_csv, tiny_backbone, storage, asked).replace("sampler: random, ", "")
    recipe = tmp_path / "recipe.yaml"
    text = text.replace("trials: 4", "trials: 4, recovery: {epochs: 12}")
    recipe.write_text(text.replace("trials: 4", "trials: 3"))

    def found(pattern: str) -> list[Path]:
        return list(storage.glob(pattern))

    family = kill_when(recipe, lambda: bool(found("compress/*/trials/*/recovery/*/metrics.jsonl") and done(storage)))
    assert not found("compress/*/students/*"), "it was killed while a student was trained"
    before, (survey,) = done(storage), found(f"compress/*/{SURVEY}")
    assert 0 < len(before) < CANDIDATES and not found(f"compress/*/{RECORD}"), "it was killed in the midst"
    surveyed = survey.stat().st_mtime_ns

    recipe.write_text(text)
    out, err = start_command("compress", recipe).communicate(timeout=600)
    assert out, err[-3000:]
    record = json.loads(out.splitlines()[-1])
    assert (record["trials"], record["complete"], record["failed"]) == (CANDIDATES, CANDIDATES, 0)
    assert f"{len(before)} are done" in err or f"{len(before)} are done" in out
    after = done(storage)
    assert len(after) == CANDIDATES and all(after[number] == values for number, values in before.items())
    assert survey.stat().st_mtime_ns == surveyed, "it was not looked at again"
    assert len(found("compress/*/students/*")) <= 1
    wait_for_end(family, timeout_s=120)
