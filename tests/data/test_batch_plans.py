"""Batches of an epoch, and each worker's share."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.batches import evaluation_batches, plan_epoch, share

SIZES = st.integers(1, 400)


def lengths_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 128, rows)


@given(SIZES, st.integers(1, 70), st.integers(0, 9), st.integers(0, 9))
def test_every_row_appears_exactly_once(rows: int, batch_size: int, seed: int, epoch: int) -> None:
    plan = plan_epoch(lengths_of(rows), np.zeros(rows, int), batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(plan).tolist()) == list(range(rows))
    assert sum(len(batch) < batch_size for batch in plan) <= 1


@given(SIZES, st.integers(1, 64), st.integers(1, 9))
def test_the_shares_of_all_workers_are_the_batch(rows: int, batch_size: int, world: int) -> None:
    for batch in plan_epoch(lengths_of(rows), np.zeros(rows, int), batch_size=batch_size, seed=1, epoch=0):
        shares = [share(batch, rank, world) for rank in range(world)]
        assert sorted(np.concatenate(shares).tolist()) == sorted(batch.tolist())
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(SIZES, st.integers(1, 64), st.integers(1, 9))
def test_each_row_is_evaluated_once_over_all_workers(rows: int, batch_size: int, world: int) -> None:
    lengths = lengths_of(rows)
    batches = [b for rank in range(world) for b in evaluation_batches(lengths, batch_size, rank, world)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
    assert max(map(len, batches)) <= batch_size


def test_the_seed_and_the_epoch_decide() -> None:
    def flat(seed: int, epoch: int) -> list[int]:
        plan = plan_epoch(lengths_of(300), np.zeros(300, int), batch_size=16, seed=seed, epoch=epoch)
        return np.concatenate(plan).tolist()

    assert flat(1, 0) == flat(1, 0)
    assert flat(1, 0) != flat(1, 1) and flat(1, 0) != flat(2, 0)


def test_batches_of_similar_lengths_waste_little_padding() -> None:
    lengths = lengths_of(2000)
    plan = plan_epoch(lengths, np.zeros(2000, int), batch_size=32, seed=1, epoch=0)
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in plan)
    assert padded < 1.15 * lengths.sum()  # at random it would be 1.9


def test_shares_of_a_batch_are_equally_long() -> None:
    lengths = lengths_of(2000)
    for batch in plan_epoch(lengths, np.zeros(2000, int), batch_size=32, seed=1, epoch=0)[:-1]:
        tokens = [int(lengths[share(batch, rank, 2)].sum()) for rank in range(2)]
        assert max(tokens) <= 1.2 * min(tokens)


def test_oversampling_makes_classes_equally_frequent_and_leaves_the_epoch_as_long() -> None:
    labels = np.repeat([0, 1, 2], [90, 9, 3])
    rows = np.concatenate(plan_epoch(lengths_of(102), labels, batch_size=8, seed=1, epoch=0, oversample=True))
    assert np.bincount(labels[rows]).tolist() == [34, 34, 34]
    assert set(rows[labels[rows] == 2].tolist()) == {99, 100, 101}
