"""Fewer rows in the table of tokens: rare tokens read the row of the frequent one whose row is nearest to theirs.

The tokenizer stays as it is, so that texts are cut into the same tokens; a compact model of a language of its own is mostly
this table (of MiniLM with six layers, 52% of the bytes). Nearest is by the cosine of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from orchestrator.compression.parts import token_tables, tokens_of
from orchestrator.compression.reshaping import Reshaping, Sample, without
from orchestrator.compression.sensitivity import Sensitivity
from orchestrator.errors import CompressionFailed
from orchestrator.models.backbones import Network
from orchestrator.models.reshaped import SharedEmbedding

_LEAST = 8
_AT_ONCE = 4096
"""Tokens that are compared with all frequent ones together."""


def apply(state: Reshaping, share: float, sample: Sample) -> Reshaping:
    """Leave this share of the table's rows.

    Raises CompressionFailed where there is no such table, or the architecture reads it in another way.
    """
    names = token_tables(state.network)
    if not names:
        raise CompressionFailed("it has no table of tokens", "leave vocabulary out")
    table = state.network.get_submodule(names[0])
    assert isinstance(table, nn.Embedding)
    counts = state.sensitivity.tokens
    if len(counts) != tokens_of(table):
        raise CompressionFailed(
            f"the sensitivity knows {len(counts)} tokens, the network has {tokens_of(table)}", "measure it again"
        )
    rows = len(table.weight)
    kept = _chosen(_row_counts(table, counts), max(min(rows, _LEAST), round(share * rows)), table.padding_idx)
    if len(kept) == rows:
        return state
    instead = _nearest(table.weight.detach(), kept)

    def null(network: Network) -> None:
        _table(network, names[0]).weight.data.copy_(table.weight[kept[instead]])

    def remove(network: Network) -> None:
        smaller = _shared(_table(network, names[0]), kept, instead)
        for name in names:
            network.set_submodule(name, smaller)

    smaller = without(state.network, [remove], null, sample, "some rows of its table of tokens")
    return replace(state, network=smaller)


def made_up(network: Network, sample: Sample) -> Sensitivity:
    """In which the tokens of the sample are rare."""
    names = token_tables(network)
    if not names:
        return Sensitivity()
    counts = torch.ones(tokens_of(network.get_submodule(names[0])), dtype=torch.int64)
    counts[sample["input_ids"].flatten().unique().cpu()] = 0
    return Sensitivity(tokens=counts.tolist())


def _row_counts(table: nn.Embedding, counts: Sequence[int]) -> torch.Tensor:
    by_token = torch.tensor(counts)
    if not isinstance(table, SharedEmbedding):
        return by_token
    return torch.zeros(len(table.weight), dtype=torch.int64).index_add(0, table.row_of.cpu().long(), by_token)


def _chosen(counts: torch.Tensor, count: int, padding: int | None) -> torch.Tensor:
    """The most frequent rows, the first of equals, in their order; the padding's is one of them."""
    order = torch.argsort(counts, descending=True, stable=True)
    if padding is not None:
        order = torch.cat([torch.tensor([padding]), order[order != padding]])
    return order[:count].sort().values


def _nearest(weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: position in ``kept`` of the row that stands for each."""
    directions = functional.normalize(weight.float(), dim=1)
    those = directions[kept].T
    instead = torch.cat([(part @ those).argmax(1) for part in directions.split(_AT_ONCE)])
    instead[kept] = torch.arange(len(kept), device=instead.device)
    return instead


def _table(network: Network, name: str) -> nn.Embedding:
    table = network.get_submodule(name)
    assert isinstance(table, nn.Embedding)
    return table


def _shared(table: nn.Embedding, kept: torch.Tensor, instead: torch.Tensor) -> SharedEmbedding:
    row_of = instead if not isinstance(table, SharedEmbedding) else instead[table.row_of.long()]
    shared = SharedEmbedding(len(row_of), len(kept), table.weight.shape[1]).to(table.weight.device)
    shared.weight = nn.Parameter(table.weight.detach()[kept].clone(), requires_grad=table.weight.requires_grad)
    shared.row_of.copy_(row_of)
    return shared.train(table.training)
