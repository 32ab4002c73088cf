"""The forward pass of BERT and its kin, from the library's own weights: the same logits, computed with less work.

In: a transformers sequence classifier and a batch of token ids. Out: its logits [batch, classes]. Three things make it
faster: of the last layer only the first token is computed, since the head reads no other; query, key and value are one
product; and on a CPU dropout masks cost a tenth (``dropout.py``). Models with anything unusual in them (adapters, other
positions, other activations) are left to the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from orchestrator.models.dropout import dropout

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": functional.gelu, "relu": functional.relu}


@dataclass(frozen=True)
class Layer:
    """One layer's modules, under the same names for all families."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    out_norm: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear
    down_norm: nn.LayerNorm
    heads: int
    attention_dropout: float
    """Probability, of attention weights; those below are of a sublayer's result."""
    out_dropout: float
    down_dropout: float

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value, self.out, self.up, self.down


@dataclass(frozen=True)
class Family:
    """What differs between the families; each function takes the classifier."""

    activation: Callable[[Any], str]
    embeddings: Callable[[Any], Any]
    sum_embeddings: Callable[[Any, torch.Tensor], torch.Tensor]
    """Classifier and token ids [batch, tokens] -> [batch, tokens, width], before norm and dropout."""
    layers: Callable[[Any], Iterator[Layer]]
    head: Callable[[Any, torch.Tensor], torch.Tensor]
    """Classifier and the first token's state [batch, width] -> logits [batch, classes]."""


def is_supported(model: nn.Module) -> bool:
    """Whether ``forward`` gives what the model itself would."""
    family, config = FAMILIES.get(type(model).__name__), getattr(model, "config", None)
    if family is None or getattr(config, "is_decoder", False):
        return False
    watched = (module._backward_hooks or getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if any(watched):  # by whoever needs each module called as the library does
        return False
    layers = list(family.layers(model))
    linears = [linear for layer in layers for linear in layer.linears]  # no adapter, not quantised, not sharded:
    plain = all(type(linear) is nn.Linear and type(linear.weight) is nn.Parameter for linear in linears)
    return plain and family.activation(model) in _ACTIVATIONS


def forward(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Logits [batch, classes].

    ``input_ids``: int64 [batch, tokens], padded on the right; ``attention_mask``: the same shape, 0 at padding.
    """
    return _forward(model, input_ids, attention_mask, lambda state: None)


def watched(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As ``forward``, and the state after each layer: [batch, tokens, width], the last one [batch, 1, width]."""
    states: list[torch.Tensor] = []
    return _forward(model, input_ids, attention_mask, states.append), states


def _forward(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, note: Callable[[torch.Tensor], None]
) -> torch.Tensor:
    """``note`` is called with the state after each layer; nobody else keeps it."""
    family = FAMILIES[type(model).__name__]
    embeddings, training = family.embeddings(model), model.training
    state = embeddings.LayerNorm(family.sum_embeddings(model, input_ids))
    state = dropout(state, embeddings.dropout.p, training)
    visible = None if bool(attention_mask.all()) else attention_mask.bool()[:, None, None, :]
    activation, layers = _ACTIVATIONS[family.activation(model)], list(family.layers(model))
    for layer in layers[:-1]:
        state = _feed_forward(layer, _attend(layer, state, state, visible, training), activation, training)
        note(state)
    # The head reads the first token alone, so the last layer asks for no other; it still attends to all.
    first = _attend(layers[-1], state[:, :1], state, visible, training)
    first = _feed_forward(layers[-1], first, activation, training)
    note(first)
    return family.head(model, first.squeeze(1))


def _attend(
    layer: Layer, asking: torch.Tensor, state: torch.Tensor, visible: torch.Tensor | None, training: bool
) -> torch.Tensor:
    """Self-attention with residual and norm, of the tokens ``asking`` [batch, some or all, width]."""
    if asking is state:
        query, key, value = _together(state, layer.query, layer.key, layer.value)
    else:
        key, value = _together(state, layer.key, layer.value)
        query = layer.query(asking)
    query, key, value = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (query, key, value))
    probability = layer.attention_dropout if training else 0.0
    if probability and state.device.type == "cpu":  # the library's kernel would draw its masks one by one
        mixed = _attention_with_dropout(query, key, value, visible, probability)
    else:
        mixed = functional.scaled_dot_product_attention(query, key, value, visible, probability)
    result = layer.out(mixed.transpose(1, 2).flatten(2))
    normed: torch.Tensor = layer.out_norm(dropout(result, layer.out_dropout, training) + asking)
    return normed


def _together(state: torch.Tensor, *linears: nn.Linear) -> tuple[torch.Tensor, ...]:
    """Several linear layers of the same input as one product: small products use a processor badly."""
    weight, bias = torch.cat([layer.weight for layer in linears]), torch.cat([layer.bias for layer in linears])
    return functional.linear(state, weight, bias).split([layer.out_features for layer in linears], dim=-1)


def _attention_with_dropout(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, probability: float
) -> torch.Tensor:
    """[batch, heads, queries, width] as the three matrices have it, step by step."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if visible is not None:
        # Added, not filled in: that is vectorised, and its backward pass is nothing.
        scores = scores + torch.zeros_like(visible, dtype=scores.dtype).masked_fill(
            ~visible, torch.finfo(scores.dtype).min
        )
    weights = dropout(scores.softmax(-1).to(value.dtype), probability, training=True)
    return weights @ value


def _feed_forward(
    layer: Layer, state: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor], training: bool
) -> torch.Tensor:
    result = dropout(layer.down(activation(layer.up(state))), layer.down_dropout, training)
    normed: torch.Tensor = layer.down_norm(result + state)
    return normed


# ----------------------------------------------------------------------------------------------------------- families


def _bert_layers(encoder: Any) -> Iterator[Layer]:
    for layer in encoder.layer:
        attention, out, down = layer.attention.self, layer.attention.output, layer.output
        yield Layer(
            attention.query, attention.key, attention.value, out.dense, out.LayerNorm,
            layer.intermediate.dense, down.dense, down.LayerNorm,
            attention.num_attention_heads, attention.dropout.p, out.dropout.p, down.dropout.p,
        )  # fmt: skip


def _distilbert_layers(model: Any) -> Iterator[Layer]:
    for layer in model.distilbert.transformer.layer:
        attention = layer.attention
        yield Layer(
            attention.q_lin, attention.k_lin, attention.v_lin, attention.out_lin, layer.sa_layer_norm,
            layer.ffn.lin1, layer.ffn.lin2, layer.output_layer_norm,
            attention.n_heads, attention.dropout.p, 0.0, layer.ffn.dropout.p,
        )  # fmt: skip


def _bert_sum(model: Any, ids: torch.Tensor) -> torch.Tensor:
    embeddings = model.bert.embeddings
    positions: torch.Tensor = embeddings.position_embeddings.weight[: ids.shape[1]]
    summed: torch.Tensor = embeddings.word_embeddings(ids) + embeddings.token_type_embeddings.weight[0] + positions
    return summed


def _roberta_sum(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Positions count from the padding token's id on, and the padding token itself is not counted."""
    embeddings, padding = model.roberta.embeddings, model.roberta.embeddings.padding_idx
    real = ids.ne(padding)
    positions = real.cumsum(1) * real + padding
    summed: torch.Tensor = (
        embeddings.word_embeddings(ids)
        + embeddings.token_type_embeddings.weight[0]
        + embeddings.position_embeddings(positions)
    )
    return summed


def _distilbert_sum(model: Any, ids: torch.Tensor) -> torch.Tensor:
    embeddings = model.distilbert.embeddings
    summed: torch.Tensor = embeddings.word_embeddings(ids) + embeddings.position_embeddings.weight[: ids.shape[1]]
    return summed


def _bert_head(model: Any, first: torch.Tensor) -> torch.Tensor:
    pooled = torch.tanh(model.bert.pooler.dense(first))
    logits: torch.Tensor = model.classifier(model.dropout(pooled))
    return logits


def _roberta_head(model: Any, first: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.classifier(first[:, None])
    return logits


def _distilbert_head(model: Any, first: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.classifier(model.dropout(model.pre_classifier(first).relu()))
    return logits


_BERT = Family(lambda model: model.config.hidden_act, lambda model: model.bert.embeddings, _bert_sum,
               lambda model: _bert_layers(model.bert.encoder), _bert_head)  # fmt: skip
_ROBERTA = Family(lambda model: model.config.hidden_act, lambda model: model.roberta.embeddings, _roberta_sum,
                  lambda model: _bert_layers(model.roberta.encoder), _roberta_head)  # fmt: skip
_DISTILBERT = Family(lambda model: model.config.activation, lambda model: model.distilbert.embeddings, _distilbert_sum,
                     _distilbert_layers, _distilbert_head)  # fmt: skip
FAMILIES: Mapping[str, Family] = {
    "BertForSequenceClassification": _BERT,
    "RobertaForSequenceClassification": _ROBERTA,
    "XLMRobertaForSequenceClassification": _ROBERTA,
    "DistilBertForSequenceClassification": _DISTILBERT,
}
