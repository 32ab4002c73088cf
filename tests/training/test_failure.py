"""The failure policy, without a cluster."""

import pickle

from orchestrator.errors import DiskFull, TrainingFailed
from orchestrator.training.failure import Retry, Stop, WorkerFailure, decide

LOST = WorkerFailure(1, "lost", "the process died")
PEER = WorkerFailure(0, "connection", "connection closed by peer")
BUG = WorkerFailure(0, "raised", "ZeroDivisionError: division by zero")


def test_a_lost_worker_is_started_again() -> None:
    assert decide([PEER, LOST], failed_before=0, max_failures=2) == Retry(
        "worker 1 was lost; going on from the last checkpoint"
    )


def test_restarts_are_bounded() -> None:
    decision = decide([LOST], failed_before=2, max_failures=2)
    assert isinstance(decision, Stop)
    assert "max_failures" in str(decision.error)
    assert "goes on from the last checkpoint" in decision.error.next_step


def test_code_that_raised_is_not_run_again() -> None:
    decision = decide([BUG, PEER], failed_before=0, max_failures=5)
    assert isinstance(decision, Stop)
    assert "division by zero" in str(decision.error)


def test_our_own_errors_keep_their_kind() -> None:
    full = DiskFull("no room", "free some")
    decision = decide([WorkerFailure(0, "raised", "no room", full), PEER], 0, 5)
    assert isinstance(decision, Stop)
    assert decision.error is full


def test_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(TrainingFailed("a", "b")))
    assert (error.message, error.next_step, str(error)) == ("a", "b", "a: b")
