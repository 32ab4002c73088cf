"""The two sublayers of BERT and its kin on a CPU, with products in bf16: forward and backward pass written out.

In: a sublayer's input and its weights. Out: its result, and gradients of both, all in fp32. These are autocast's products,
residuals and norms. Between them everything stays bf16 in memory, dropout is one operation on bits, and what the backward
pass needs is kept once: each pass over memory costs about as much as a fiftieth of a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.models.dropout import kept

_HALF = torch.bfloat16
_aten = torch.ops.aten


def attention(
    state: Tensor, hidden: Tensor | None, heads: int, dropped: tuple[float, float],
    linears: tuple[nn.Linear, ...], norm: nn.LayerNorm,
) -> Tensor:  # fmt: skip
    """Self-attention with residual and norm.

    ``state``: [batch, tokens, width]. ``hidden``: bool [batch, 1, 1, some], which of the last keys are padding.
    ``dropped``: the shares of attention weights and of the result. ``linears``: query, key, value, out.
    """
    result: Tensor = _Attention.apply(
        state, hidden, heads, dropped, norm.eps, *_parameters(*linears), norm.weight, norm.bias
    )
    return result


def feed_forward(state: Tensor, dropped: float, up: nn.Linear, down: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """Two linear layers with gelu between them, residual and norm."""
    result: Tensor = _FeedForward.apply(state, dropped, norm.eps, *_parameters(up, down), norm.weight, norm.bias)
    return result


def _parameters(*linears: nn.Linear) -> list[Tensor]:
    return [linear.weight for linear in linears] + [linear.bias for linear in linears]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, state: Tensor, hidden: Tensor | None, heads: int, dropped: tuple[float, float], eps: float,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        *inner, outer, query_b, key_b, value_b, outer_b, norm_w, norm_b = parameters
        batch, rows, inner, outer = len(state), state.flatten(0, 1), torch.cat(inner).to(_HALF), outer.to(_HALF)
        halved = rows.to(_HALF)
        together = torch.addmm(torch.cat([query_b, key_b, value_b]).to(_HALF), halved, inner.t())
        by_head = _by_head(together, batch, 3, heads)
        query, key, value = by_head
        scale = query.shape[-1] ** -0.5
        scores = _product(query, key.transpose(1, 2), scale)
        if hidden is not None:
            of_padding = scores.view(batch, heads, *scores.shape[1:])[..., -hidden.shape[-1] :]
            of_padding.masked_fill_(hidden, torch.finfo(_HALF).min)
        weights = scores.softmax(-1, dtype=torch.float32).to(_HALF)  # its kernel for bf16 is three times as slow
        mask, gain = _mask(weights, dropped[0])
        used = _masked(weights, mask)
        mixed = _by_row(_product(used, value, gain)[None], batch, heads)
        result = torch.addmm(outer_b.to(_HALF), mixed, outer.t())
        output, context.gain, *normed = _add_and_norm(rows, result, dropped[1], norm_w, norm_b, eps)
        context.save_for_backward(inner, outer, halved, by_head, weights, used, mask, mixed, norm_w, norm_b, *normed)
        context.settings = batch, heads, scale, gain
        return output.view_as(state)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inner, outer, halved, by_head, weights, used, mask, mixed, *norm = context.saved_tensors
        batch, heads, scale, gain = context.settings
        straight, below, of_norm = _add_and_norm_backward(gradient, context.gain, *norm)
        outer_w, outer_b = _linear_backward(below, mixed)
        (below,) = _by_head(below @ outer, batch, 1, heads)
        query, key, value = by_head
        of_weights = _masked(_product(below, value.transpose(1, 2), gain), mask)
        of_scores = _aten._softmax_backward_data(of_weights, weights, -1, _HALF)
        parts = torch.empty_like(by_head)
        _product(of_scores, key, scale, parts[0])
        _product(of_scores.transpose(1, 2), query, scale, parts[1])
        _product(used.transpose(1, 2), below, gain, parts[2])
        below = _by_row(parts, batch, heads)
        inner_w, inner_b = _linear_backward(below, halved)
        straight += below @ inner
        return (
            straight.view_as(gradient), None, None, None, None,
            *inner_w.chunk(3), outer_w, *inner_b.chunk(3), outer_b, *of_norm,
        )  # fmt: skip


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, state: Tensor, dropped: float, eps: float, *parameters: Tensor) -> Tensor:
        up, down, up_b, down_b, norm_w, norm_b = parameters
        rows, up, down = state.flatten(0, 1), up.to(_HALF), down.to(_HALF)
        halved = rows.to(_HALF)
        middle = torch.addmm(up_b.to(_HALF), halved, up.t())
        active = functional.gelu(middle)
        result = torch.addmm(down_b.to(_HALF), active, down.t())
        output, context.gain, *normed = _add_and_norm(rows, result, dropped, norm_w, norm_b, eps)
        context.save_for_backward(up, down, halved, middle, active, norm_w, norm_b, *normed)
        return output.view_as(state)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        up, down, halved, middle, active, *norm = context.saved_tensors
        straight, below, of_norm = _add_and_norm_backward(gradient, context.gain, *norm)
        down_w, down_b = _linear_backward(below, active)
        below = _aten.gelu_backward(below @ down, middle)
        up_w, up_b = _linear_backward(below, halved)
        straight += below @ up
        return straight.view_as(gradient), None, None, up_w, down_w, up_b, down_b, *of_norm


def _add_and_norm(
    rows: Tensor, result: Tensor, dropped: float, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Any, ...]:
    """Norm of ``rows`` plus a sublayer's result after dropout; then its factor, and what the backward pass needs."""
    mask, gain = _mask(result, dropped)
    summed = torch.add(rows, _masked(result, mask), alpha=gain)
    output, mean, scale = torch.native_layer_norm(summed, rows.shape[1:], weight, bias, eps)
    return output, gain, summed, mean, scale, mask


def _add_and_norm_backward(
    gradient: Tensor, gain: float, weight: Tensor, bias: Tensor, summed: Tensor, mean: Tensor, scale: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of the residual, of the sublayer's result (bf16), and of the norm's weight and bias."""
    straight, *of_norm = _aten.native_layer_norm_backward(
        gradient.flatten(0, 1), summed, summed.shape[1:], mean, scale, weight, bias, [True, True, True]
    )
    return straight, _masked((straight * gain).to(_HALF), mask), of_norm


def _linear_backward(gradient: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of weight and bias."""
    return (gradient.t() @ rows).float(), gradient.sum(0).float()


def _product(left: Tensor, right: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """Of two batches of matrices."""
    if out is None:
        out = left.new_empty(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0.0, alpha=factor, out=out)


def _mask(values: Tensor, dropped: float) -> tuple[Tensor | None, float]:
    """int16: all bits where a value is kept, none where it is dropped; and what kept values are multiplied with."""
    if dropped == 0.0:
        return None, 1.0
    return kept(values.shape, dropped).neg_().to(torch.int16), 1.0 / (1.0 - dropped)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else (values.view(torch.int16) & mask).view(_HALF)


def _by_head(rows: Tensor, batch: int, parts: int, heads: int) -> Tensor:
    """[batch x tokens, parts x width] -> [parts, batch x heads, tokens, width of a head]"""
    split = rows.view(batch, len(rows) // batch, parts, heads, -1)
    return split.permute(2, 0, 3, 1, 4).reshape(parts, batch * heads, split.shape[1], -1)


def _by_row(parts: Tensor, batch: int, heads: int) -> Tensor:
    """The inverse of ``_by_head``."""
    split = parts.view(len(parts), batch, heads, *parts.shape[2:])
    return split.permute(1, 3, 0, 2, 4).reshape(batch * parts.shape[2], -1)
