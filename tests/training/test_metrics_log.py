"""The log of a run: every step once, on disk when a checkpoint is, and never a reason to wait for ever."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.errors import DiskFull
from orchestrator.storage import METRICS, TENSORBOARD
from orchestrator.training.metrics_log import MetricsLog, read_metrics


@contextmanager
def no_file_larger_than(limit_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_steps(log: MetricsLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.write("train", step, {"epoch": 0, "loss": 1.0 / step, "shown": "text is for people"})


def test_a_run_that_goes_back_writes_its_steps_again_and_once(tmp_path: Path) -> None:
    for resume_step, last in ((0, 10), (5, 8), (8, 12)):
        log = MetricsLog(tmp_path, resume_step)
        write_steps(log, resume_step + 1, last)
        log.close()
    assert [line["step"] for line in read_metrics(tmp_path / METRICS)] == list(range(1, 13))


def test_a_half_written_last_line_is_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    write_steps(log, 1, 3)
    log.close()
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'{"kind": "train", "st')
    assert len(read_metrics(tmp_path / METRICS)) == 3


def test_what_was_flushed_is_in_both_files_without_a_close(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    write_steps(log, 1, 50)
    log.flush()
    (board,) = (tmp_path / TENSORBOARD).iterdir()
    assert board.read_bytes().count(b"train/loss") == 50
    assert len(read_metrics(tmp_path / METRICS)) == 50
    log.close()


def test_a_full_disk_is_said_at_once_and_what_was_logged_before_can_be_read(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    with no_file_larger_than(20_000), pytest.raises(DiskFull, match="no room to write .*metrics"):
        write_steps(log, 1, 10_000)
    log.close()
    steps = [line["step"] for line in read_metrics(tmp_path / METRICS)]
    assert steps == list(range(1, len(steps) + 1)) and 100 < len(steps) < 10_000
    log = MetricsLog(tmp_path, steps[-1])  # with room again it goes on
    write_steps(log, steps[-1] + 1, steps[-1] + 5)
    log.close()
    assert read_metrics(tmp_path / METRICS)[-1]["step"] == steps[-1] + 5
