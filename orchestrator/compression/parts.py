"""What can be taken out of a network, found by the names and shapes of its modules.

In: a network of any architecture. Out: its row of layers, its attentions with the matrices of their heads, its feed-forward
pairs, its table of tokens. Finding claims nothing: whoever takes a part out proves that it was what it looked like
(``reshaping.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from orchestrator.compression.matrices import input_size, is_matrix, output_size
from orchestrator.models.reshaped import SharedEmbedding

_SEPARATE = (
    ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"),
    ("query_proj", "key_proj", "value_proj"), ("q_head", "k_head", "v_head"),
)  # fmt: skip
"""Names of the three projections."""
_BESIDE = ("pos_key_proj", "pos_query_proj", "pos_proj", "pos_q_proj")
"""Projections of positions, which have heads too (DeBERTa)."""
_FUSED = ("c_attn", "Wqkv", "query_key_value", "qkv_proj", "in_proj", "qkv")
"""Names of the three in one matrix."""
_OUT = ("out_lin", "o_proj", "out_proj", "c_proj", "Wo", "o", "dense", "post_proj", "proj")
_OUT_ELSEWHERE = "output.dense"
"""Beside the module that has the projections (BERT)."""
_HEAD_SIZES = ("attention_head_size", "head_dim", "head_size", "dim_per_head")
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|intermediate|fc|block|lin1")
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")


@dataclass(frozen=True)
class Row:
    """Layers of one kind, one after the other."""

    path: str
    length: int


@dataclass(frozen=True)
class Attention:
    name: str
    """Path of the module that has the projections."""
    projections: tuple[str, ...]
    """Paths of matrices whose outputs are heads, one after the other."""
    fused: str
    """Path of the matrix that is query, key and value in one, in place of three projections; else empty."""
    out: str
    """Path of the matrix whose inputs are the heads' results, one after the other."""
    heads: int
    """That can go one by one. Where several queries share a key, all of these together are one."""


@dataclass(frozen=True)
class FeedForward:
    ups: tuple[str, ...]
    """Paths of the matrices that expand; gated ones are two, or one with twice the outputs."""
    down: str
    """Path of the one that contracts: its inputs are the units."""
    units: int


def longest_row(network: nn.Module) -> Row | None:
    """The longest list or sequence of blocks of one class, each of several modules; of several rows, the first."""
    rows = [Row(name, len(module)) for name, module in network.named_modules() if _is_row(module)]
    return max(rows, key=lambda row: row.length, default=None)


def _is_row(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
        return False
    blocks = [part for part in module if any(True for _ in part.children()) and not isinstance(part, nn.Sequential)]
    return len(blocks) == len(module) and len({type(block) for block in blocks}) == 1


def attentions(network: nn.Module) -> list[Attention]:
    found = (_attention(network, name, module) for name, module in network.named_modules())
    return [attention for attention in found if attention and attention.heads > 0]


def _attention(network: nn.Module, name: str, module: nn.Module) -> Attention | None:
    children = {leaf for leaf, child in module.named_children() if is_matrix(child)}
    three: tuple[str, ...] = next((names for names in _SEPARATE if children.issuperset(names)), ())
    fused = next((leaf for leaf in _FUSED if leaf in children and not three), "")
    if not three and not fused:
        return None
    out = next((f"{name}.{leaf}" for leaf in _OUT if leaf in children and leaf not in three), "")
    out = out or f"{name.rpartition('.')[0]}.{_OUT_ELSEWHERE}"
    if out not in dict(network.named_modules()) or not is_matrix(network.get_submodule(out)):
        return None
    width = input_size(network.get_submodule(out))
    key = width if fused else output_size(module.get_submodule(three[1]))
    leaves = [*three, *(leaf for leaf in _BESIDE if leaf in children)]
    return Attention(
        name, tuple(f"{name}.{leaf}" for leaf in leaves), f"{name}.{fused}" if fused else "", out,
        key // max(1, _head_size(module, width)),
    )  # fmt: skip


def _head_size(module: nn.Module, width: int) -> int:
    """Columns per head; more than there are where the module does not tell."""
    attributes = vars(module)
    for name in _HEAD_SIZES:
        if isinstance(size := attributes.get(name), int):
            return size
    for name in _HEAD_COUNTS:
        if isinstance(count := attributes.get(name), int) and count:
            return width // count
    return width + 1


def feed_forwards(network: nn.Module) -> list[FeedForward]:
    """A matrix that contracts to the width that the ones right before it expand from; or did, before units were taken out."""
    taken = {
        path for attention in attentions(network) for path in (*attention.projections, attention.fused, attention.out)
    }
    matrices = [(name, module) for name, module in _matrices(network) if name not in taken]
    found: list[FeedForward] = []
    while matrices:  # from the end, so that a gate is not taken for what contracts
        down, module = matrices.pop()
        units, width = input_size(module), output_size(module)
        ups: list[str] = []
        for before, other in reversed(matrices):
            if input_size(other) != width or output_size(other) not in (units, 2 * units):
                break
            if units > width or _are_feed_forward(before, down):
                ups.insert(0, before)
        if ups:
            found.insert(0, FeedForward(tuple(ups), down, units))
            del matrices[len(matrices) - len(ups) :]
    return found


def _are_feed_forward(up: str, down: str) -> bool:
    """By their names: of one block, and called so."""
    one, other = up.split("."), down.split(".")
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    siblings = len(one) == len(other) == shared + 1
    apart = any(segment.isdigit() for segment in (*one[shared:], *other[shared:]))
    return bool(_FEED_FORWARD.search(".".join(one[-3:]))) and (siblings or not apart)


def _matrices(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """In the network's order, factored ones as one."""
    inside: set[nn.Module] = set()
    for name, module in network.named_modules():
        if is_matrix(module) and module not in inside:
            inside.update(module.children())
            yield name, module


def token_tables(network: nn.Module) -> list[str]:
    """Every name of the module that turns tokens into vectors; empty where there is none."""
    find = getattr(network.get_submodule("model"), "get_input_embeddings", None)
    try:
        table = find() if find else None
    except NotImplementedError:  # what transformers says of a model that reads no tokens
        table = None
    if not isinstance(table, nn.Embedding):
        return []
    return [name for name, module in network.named_modules(remove_duplicate=False) if module is table]


def tokens_of(table: nn.Module) -> int:
    """How many tokens the tokenizer may give it."""
    return len(table.row_of if isinstance(table, SharedEmbedding) else table.weight)  # type: ignore[arg-type]
