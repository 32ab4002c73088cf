"""Which worker hangs, told from its signs of life."""

import threading
import time

from orchestrator.training.watch import Beat, Heart, Watch


def beat(rank: int, count: int, *, is_over: bool = False) -> Beat:
    return Beat(rank, f"node {rank}", count, "loop.py:1 in train_step", is_over)


def ranks(watch: Watch, now_s: float) -> list[int]:
    return [hang.rank for hang in watch.hung(now_s)]


def test_a_process_that_gives_no_sign_is_named_and_not_the_one_that_waits_for_it() -> None:
    watch = Watch(timeout_s=5.0)
    watch.note([beat(0, 7), beat(1, 7)], now_s=0.0)
    for second in range(1, 6):
        watch.note([beat(0, 8)], float(second))
        assert ranks(watch, float(second)) == []
    watch.note([beat(0, 8)], 5.5)
    (hang,) = watch.hung(5.5)
    assert (hang.rank, hang.process) == (1, "node 1")
    assert "gave no sign of life for 5 s" in hang.message and "loop.py:1 in train_step" in hang.message


def test_of_workers_that_all_stand_still_the_one_that_did_least_is_named() -> None:
    watch = Watch(timeout_s=5.0)
    for second in range(8):
        watch.note([beat(0, 9), beat(1, 8), beat(2, 9)], float(second))
        assert ranks(watch, float(second)) == ([1] if second > 5 else [])


def test_loading_may_take_what_it_takes() -> None:
    watch = Watch(timeout_s=5.0)
    for second in range(100):
        watch.note([beat(0, 0), beat(1, 0)], float(second))
        assert ranks(watch, float(second)) == []


def test_a_slow_step_is_no_hang_as_long_as_somebody_gets_on() -> None:
    watch = Watch(timeout_s=5.0)
    for second in range(40):
        watch.note([beat(0, second // 4), beat(1, 1)], float(second))
        assert ranks(watch, float(second)) == []


def test_a_worker_that_is_done_is_not_missed() -> None:
    watch = Watch(timeout_s=5.0)
    watch.note([beat(0, 9), beat(1, 9, is_over=True)], 0.0)
    for second in range(1, 20):
        watch.note([beat(0, 9 + second)], float(second))
        assert ranks(watch, float(second)) == []


def test_the_heart_tells_where_the_worker_is_and_when_it_is_over() -> None:
    sent: list[Beat] = []
    with Heart(3, "node 42", sent.append, every_s=0.01) as done:
        for _ in range(5):
            done()
        time.sleep(0.1)
    assert (sent[0].rank, sent[0].process) == (3, "node 42")
    assert sent[-2].count == 5 and not sent[-2].is_over
    assert sent[-1].is_over
    assert not any(thread.name == "heart" for thread in threading.enumerate())
