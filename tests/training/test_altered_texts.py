"""Altered texts are made of the batch's own tokens, keep their lengths and their ends, and say which they are."""

import torch

from orchestrator.training.altered_texts import alter

FIRST, LAST, PADDING = 101, 102, 0


def batch(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row n holds tokens from 1000 n on."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = (1000 * torch.arange(1, len(lengths) + 1)[:, None] + torch.arange(max(lengths))) * mask
    ids[:, 0] = FIRST
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = LAST
    return ids, mask


def test_some_rows_are_altered_and_told() -> None:
    ids, mask = batch(*range(12, 52))
    torch.manual_seed(0)
    altered, told = alter(ids, mask, 0.75)
    assert torch.equal((altered != ids).any(1), told)
    assert 0.55 < float(told.float().mean()) < 0.95
    assert torch.equal(altered[mask == 0], ids[mask == 0]), "padding stays"
    assert bool((altered[:, 0] == FIRST).all())
    assert bool((altered[torch.arange(40), mask.sum(1) - 1] == LAST).all())
    inner = (mask == 1) & (ids != FIRST) & (ids != LAST)
    assert set(altered[inner].tolist()) <= set(ids[inner].tolist()), "no special token gets inside a text"


def test_both_ways_of_altering_happen() -> None:
    ids, mask = batch(*[40] * 64)
    torch.manual_seed(0)
    altered, told = alter(ids, mask, 1.0)
    assert bool(told.all())
    foreign = (altered // 1000 != ids // 1000) & (ids > LAST)
    first, second = foreign[:, 1:20].float().mean(1), foreign[:, 20:39].float().mean(1)
    assert 0.08 < float(first.mean()) < 0.22, "tokens are replaced everywhere"
    halved = second > 0.8
    assert 0.3 < float(halved.float().mean()) < 0.7
    row = int(halved.nonzero()[0])
    places = torch.arange(20, 39)
    assert float((altered[row, 20:39] % 1000 == places).float().mean()) > 0.7, (
        "another text's second half, in its order"
    )


def test_with_a_share_of_nothing_all_stays_and_rows_without_an_inside_too() -> None:
    ids, mask = batch(9, 30, 4)
    altered, told = alter(ids, mask, 0.0)
    assert torch.equal(altered, ids) and not bool(told.any())
    ids, mask = batch(2, 2, 1)
    altered, told = alter(ids, mask, 1.0)
    assert torch.equal(altered, ids) and not bool(told.any())


def test_the_same_seed_alters_alike() -> None:
    ids, mask = batch(*range(12, 52))
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(alter(ids, mask, 0.5)[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
