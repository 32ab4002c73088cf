"""Texts that nobody wrote, for a teacher to answer: a student then learns from more than the rows there are (TinyBERT, Jiao et
al. 2020, replaces words; Tang et al. 2019 masks and samples them).

In: a batch of token ids. Out: the same with some rows altered: some have the second half of another row, and some of their
tokens are those of other rows. Their labels are no longer theirs. The first token and the last stay: they are the tokenizer's.
Random numbers are torch's, so that a step that is done again has the same.
"""

from __future__ import annotations

import torch

_REPLACED = 0.15
"""Of an altered row's tokens."""
_HALVES = 0.5
"""Of the altered rows, those with the second half of another."""


def alter(ids: torch.Tensor, mask: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``ids``: int64 [batch, tokens], padded on the right; ``mask``: the same shape, 0 at padding. ``share`` of the rows are
    altered, by chance each.

    Returns: ids of the same shape and lengths, and which rows differ from before, bool [batch].
    """
    drawn = torch.rand(len(ids), 2, device=ids.device)
    chosen = drawn[:, 0] < share
    halved = torch.where((chosen & (drawn[:, 1] < _HALVES))[:, None], _with_others_halves(ids, mask), ids)
    replaced = chosen[:, None] & _inner(mask) & (torch.rand(ids.shape, device=ids.device) < _REPLACED)
    altered = torch.where(replaced, _others(ids, mask), halved)
    return altered, (altered != ids).any(1)


def _inner(mask: torch.Tensor) -> torch.Tensor:
    """bool [batch, tokens]: neither padding nor a row's first or last token."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return (places > 0) & (places < mask.sum(1, keepdim=True) - 1)


def _others(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Everywhere a token of the batch, as often as it comes; the ids themselves if there is none."""
    pool = ids[_inner(mask)]
    return pool[torch.randint(len(pool), ids.shape, device=ids.device)] if len(pool) else ids


def _with_others_halves(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each row as long as it was, from its middle on what another row has from its own middle on, as far as that goes."""
    partner = torch.randperm(len(ids), device=ids.device)
    lengths = mask.sum(1, keepdim=True)
    middles, theirs = lengths // 2, lengths[partner]
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    sources = places - middles + theirs // 2
    taken = _inner(mask) & (places >= middles) & (sources < theirs - 1)
    return torch.where(taken, ids[partner].gather(1, sources.clamp(0, ids.shape[1] - 1)), ids)
