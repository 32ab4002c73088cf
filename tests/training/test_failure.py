"""The failure policy, without a cluster."""

import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.errors import DiskFull, IntegrityError, TrainingFailed
from orchestrator.recipe import Training
from orchestrator.training.failure import (
    Diverged,
    Remedies,
    Retry,
    Stop,
    WorkerFailure,
    decide,
    failure_of,
)

LOST = WorkerFailure(1, "lost", "the process died")
PEER = WorkerFailure(0, "connection", "connection closed by peer")
BUG = WorkerFailure(0, "raised", "model.py:3 in forward (1 / 0): ZeroDivisionError: division by zero")
OOM = WorkerFailure(1, "out_of_memory", "OutOfMemoryError: CUDA out of memory")
NAN = WorkerFailure(0, "diverged", "the loss is nan at step 7")
FRESH = Remedies()


def decided(
    *failures: WorkerFailure, restarts: int = 0, remedies: Remedies = FRESH, newest: int = 0, **training: object
) -> Retry | Stop:
    return decide(failures, restarts, remedies, Training.model_validate(training), workers=2, newest=newest)


def test_a_lost_worker_is_started_again() -> None:
    assert decided(PEER, LOST) == Retry("worker 1 was lost; going on from the last checkpoint", FRESH, is_restart=True)


def test_a_hung_worker_is_named_with_its_line_and_started_again() -> None:
    hung = WorkerFailure(3, "hung", "gave no sign of life for 5 s, last at worker.py:7 in _step, and was ended")
    decision = decided(PEER, hung)
    assert isinstance(decision, Retry) and decision.is_restart
    assert decision.reason.startswith("worker 3 gave no sign of life for 5 s, last at worker.py:7")


def test_restarts_are_bounded() -> None:
    decision = decided(LOST, restarts=2, max_failures=2)
    assert isinstance(decision, Stop)
    assert "max_failures" in str(decision.error)
    assert "goes on from the last checkpoint" in decision.error.next_step


def test_code_that_raised_is_not_run_again_whatever_else_failed() -> None:
    decision = decided(PEER, LOST, OOM, BUG, max_failures=5)
    assert isinstance(decision, Stop)
    assert "division by zero" in str(decision.error)


def test_our_own_errors_keep_their_kind() -> None:
    broken = IntegrityError("rows.arrow is not what was written", "restore it")
    decision = decided(failure_of(0, broken), PEER)
    assert decision == Stop(broken, "raised")


def test_out_of_memory_halves_the_rows_at_a_time_until_one_is_left() -> None:
    remedies, said = FRESH, []
    while isinstance(decision := decided(OOM, remedies=remedies, batch_size=32, accumulate_steps=2), Retry):
        remedies = decision.remedies
        said.append(re.findall(r"with (\d+) rows at a time", decision.reason))
        assert not decision.is_restart, "it does not use up the restarts"
    assert said == [["8", "4"], ["4", "2"], ["2", "1"]]
    assert remedies == Remedies(accumulate_factor=8)
    assert "single row" in str(decision.error) and "max_tokens" in decision.error.next_step


def test_a_diverged_run_goes_back_with_half_the_learning_rate_a_bounded_number_of_times() -> None:
    remedies, rates = FRESH, []
    while isinstance(decision := decided(NAN, remedies=remedies, max_rollbacks=3), Retry):
        remedies = decision.remedies
        rates.append(remedies.rate_factor)
    assert rates == [0.5, 0.25, 0.125]
    assert "the loss is nan at step 7, after 3 tries" in str(decision.error)


def test_a_checkpoint_from_which_a_run_diverged_twice_is_dropped() -> None:
    first = decided(NAN, newest=30)
    assert isinstance(first, Retry) and not first.drop_newest
    assert "to the last checkpoint" in first.reason
    second = decided(NAN, newest=30, remedies=first.remedies)
    assert isinstance(second, Retry) and second.drop_newest
    assert "to the checkpoint before the last" in second.reason
    third = decided(NAN, newest=15, remedies=second.remedies)
    assert isinstance(third, Retry) and third.drop_newest, "the one before was no better"
    later = decided(NAN, newest=45, remedies=first.remedies)
    assert isinstance(later, Retry) and not later.drop_newest, "it got further"


def test_memory_is_the_cause_when_the_others_only_miss_their_peer() -> None:
    assert decided(PEER, OOM).remedies == replace(FRESH, accumulate_factor=2)  # type: ignore[union-attr]


def test_a_full_disk_is_waited_for() -> None:
    full = DiskFull("no room to write x", "free some")
    decision = decided(PEER, failure_of(0, full))
    assert decision == Retry("no room to write x; going on when there is room", FRESH, disk_full=full)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), "out_of_memory"),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "connection"),
        (Diverged("the loss is nan"), "diverged"),
        (DiskFull("no room"), "no_room"),
        (TrainingFailed("something of ours"), "raised"),
        (KeyError("connection"), "raised"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "raised"),
    ],
)
def test_an_exception_is_of_a_kind(error: Exception, kind: str) -> None:
    assert failure_of(0, error).kind == kind


def test_memory_that_cannot_be_had_is_known_by_what_torch_really_says() -> None:
    """A process with a limit on its memory."""
    said = subprocess.run(
        [sys.executable, "-c",
         "import resource, torch\n"
         "from orchestrator.training.failure import failure_of\n"
         "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
         "try:\n  torch.ones(3 << 30)\n"
         "except Exception as error:\n  print(failure_of(1, error).kind, error)"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout.startswith("out_of_memory"), said.stdout + said.stderr


def test_the_users_own_line_is_on_top(tmp_path: Path) -> None:
    theirs = tmp_path / "their_model.py"
    theirs.write_text("import torch\ndef forward(x):\n    return torch.linalg.inv(x)  # not square\n")
    namespace: dict[str, object] = {}
    exec(compile(theirs.read_text(), str(theirs), "exec"), namespace)
    with pytest.raises(RuntimeError) as caught:
        namespace["forward"](torch.ones(2, 3))  # type: ignore[operator]
    message = failure_of(0, caught.value).message
    assert message.startswith(f"{theirs}:3 in forward (return torch.linalg.inv(x)  # not square): RuntimeError: ")
    assert len(message.splitlines()) == 1


def test_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(Diverged("a", "b")))
    assert (type(error), error.message, error.next_step, str(error)) == (Diverged, "a", "b", "a: b")
