"""Fewer attention heads: the rows of query, key and value, and the columns of the matrix that reads their results.

Layers may be left with different numbers; each keeps at least one. Queries that share a key go together with it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from orchestrator.compression.matrices import input_size, keep_inputs, keep_outputs, keep_rows, output_size, zero_inputs
from orchestrator.compression.parts import Attention, attentions
from orchestrator.compression.ranking import keep_best
from orchestrator.compression.refit import refit
from orchestrator.compression.reshaping import Reshaping, Sample, without, without_kept
from orchestrator.compression.sensitivity import Sensitivity
from orchestrator.compression.tokens import work
from orchestrator.errors import CompressionFailed
from orchestrator.models.backbones import Network

_COUNTS = (
    "num_attention_heads", "num_heads", "n_heads", "n_head", "num_key_value_heads", "num_kv_heads",
    "all_head_size", "split_size", "inner_dim",
)  # fmt: skip
"""Attributes of an attention that are in proportion to its heads."""
_LAYOUTS = ("stacked", "interleaved")
"""Of a fused matrix: all queries, all keys, all values; or query, key and value of each head in turn."""


def apply(state: Reshaping, share: float, sample: Sample) -> Reshaping:
    """Leave this share of all heads.

    Raises CompressionFailed where heads cannot be taken out of this architecture.
    """
    found = attentions(state.network)
    if not found:
        raise CompressionFailed("it has no attention whose heads are rows of matrices that could go", "leave heads out")
    if all(attention.heads == 1 for attention in found):
        raise CompressionFailed("each of its attentions has one head, or one key for all of them", "leave heads out")
    try:
        scores = {attention.name: state.sensitivity.heads[attention.name] for attention in found}
    except KeyError as error:
        raise CompressionFailed(f"the sensitivity does not know the attention {error}", "measure it again") from None
    kept = keep_best(scores, share, lambda heads: 1, work(state, list(scores), sample, after=False))
    if all(len(kept[attention.name]) == attention.heads for attention in found):
        return state

    def null(network: Network) -> None:
        for attention in found:
            out = network.get_submodule(attention.out)
            gone = without_kept(attention.heads, kept[attention.name])
            zero_inputs(out, _blocks(gone, input_size(out) // attention.heads))

    def remover(layout: str) -> Callable[[Network], None]:
        def remove(network: Network) -> None:
            for attention in found:
                _leave(network, attention, kept[attention.name], layout)

        return remove

    layouts = _LAYOUTS if any(attention.fused for attention in found) else _LAYOUTS[:1]
    smaller = without(state.network, [remover(layout) for layout in layouts], null, sample, "some of its heads")
    sensitivity, columns = state.sensitivity, {}
    for attention in found:
        size = input_size(state.network.get_submodule(attention.out)) // attention.heads
        columns[attention.out] = _blocks(kept[attention.name], size)
        sensitivity = sensitivity.keeping("heads", attention.name, kept[attention.name])
        sensitivity = sensitivity.keeping("inputs", attention.out, columns[attention.out])
    refit(state.network, smaller, columns, state.batches)
    return replace(state, network=smaller, sensitivity=sensitivity)


def made_up(network: Network, sample: Sample) -> Sensitivity:
    """In which heads differ, by chance."""
    numbers = random.Random(0)
    return Sensitivity(heads={a.name: [numbers.random() for _ in range(a.heads)] for a in attentions(network)})


def _leave(network: nn.Module, attention: Attention, kept: Sequence[int], layout: str) -> None:
    module, out = network.get_submodule(attention.name), network.get_submodule(attention.out)
    width, left = input_size(out), len(kept)
    if left == attention.heads:
        return
    columns = _blocks(kept, width // attention.heads)
    for path in attention.projections:
        projection = network.get_submodule(path)
        keep_outputs(projection, _blocks(kept, output_size(projection) // attention.heads))
    if attention.fused:
        _leave_fused(network.get_submodule(attention.fused), kept, width, attention.heads, layout)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape == torch.Size([width]):  # biases kept beside the matrices
            keep_rows(module, name, columns)
    keep_inputs(out, columns)
    for name in _COUNTS:
        if isinstance(value := vars(module).get(name), int):
            setattr(module, name, value * left // attention.heads)


def _leave_fused(fused: nn.Module, kept: Sequence[int], width: int, heads: int, layout: str) -> None:
    if output_size(fused) != 3 * width:
        raise ValueError(f"a matrix for {3 * width} queries, keys and values has {output_size(fused)} outputs")
    if layout == "interleaved":
        keep_outputs(fused, _blocks(kept, 3 * width // heads))
    else:
        columns = _blocks(kept, width // heads)
        keep_outputs(fused, [part * width + column for part in range(3) for column in columns])


def _blocks(positions: Sequence[int], size: int) -> list[int]:
    """Positions of the elements of these blocks."""
    return [position * size + element for position in positions for element in range(size)]
