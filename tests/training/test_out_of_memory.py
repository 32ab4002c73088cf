"""Memory that really runs out: a process that may not have more, and the remedy that lets the same run end."""

import multiprocessing
import os
import resource
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from knobs import ALONE, changed, text_job, weights

from orchestrator.storage import Storage
from orchestrator.training.failure import Retry, WorkerFailure, decide, failure_of
from orchestrator.training.state import read_remedies, write_remedies
from orchestrator.training.worker import TrainJob, train_worker

MB = 1 << 20
ROOM = 150 * MB
"""More than the network needs with a few rows at a time, less than with a hundred."""


@pytest.fixture
def wide_backbone(tiny_backbone: Path, tmp_path: Path) -> Path:
    """Few weights, but 8,192 numbers per token between two of them."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_backbone, intermediate_size=8192)
    AutoModel.from_config(config).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def test_a_run_whose_memory_runs_out_ends_with_fewer_rows_at_a_time(
    reviews_csv: Path, wide_backbone: Path, tmp_path: Path
) -> None:
    job = text_job(reviews_csv, wide_backbone, tmp_path / "runs")
    training = {"batch_size": 100, "accumulate_steps": 1, "epochs": 1}
    short = changed(job, "short", training)
    told = []
    while failure := attempt(short):
        assert failure.kind == "out_of_memory", failure
        remedies = read_remedies(Storage(short.recipe.storage), short.run)
        decision = decide([failure], 0, remedies, short.recipe.training, workers=1, newest=0)
        assert isinstance(decision, Retry), decision
        write_remedies(Storage(short.recipe.storage), short.run, decision.remedies)
        told.append(decision.reason)
    assert told[0].startswith("worker 0 ran out of memory with 100 rows at a time; going on"), told
    factor = read_remedies(Storage(short.recipe.storage), short.run).accumulate_factor
    assert factor == 2 ** len(told) <= 32
    by_hand = changed(job, "by-hand", training | {"accumulate_steps": factor})
    train_worker(by_hand, ALONE, lambda event: None)
    assert all(torch.equal(weight, weights(by_hand)[name]) for name, weight in weights(short).items())


def attempt(job: TrainJob) -> WorkerFailure | None:
    """In a new process, which has nothing to spare, and may take ``ROOM`` more memory than a small run leaves it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["orchestrator.training.worker"])
    mine, theirs = context.Pipe()
    process = context.Process(target=work, args=(job, theirs))
    process.start()
    process.join()
    assert process.exitcode == 0
    result: WorkerFailure | None = mine.recv()
    return result


def work(job: TrainJob, answer: Connection) -> None:
    torch.set_num_threads(1)
    small = changed(job, f"small-{os.getpid()}", {"batch_size": 2, "accumulate_steps": 1, "epochs": 1})
    train_worker(small, ALONE, lambda event: None)  # so that every library has its threads
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    try:
        train_worker(job, ALONE, lambda event: None)
    except Exception as error:  # noqa: BLE001  whatever it is, the test decides
        failure = failure_of(0, error)
        answer.send(replace(failure, error=None))
    else:
        answer.send(None)
