"""The forward pass of BERT and its kin, from the library's own weights: the same logits, computed with less work.

In: a transformers sequence classifier and a batch of token ids. Out: its logits [batch, classes]. Three things make it
faster: of the last layer only the first token is computed, since the head reads no other; query, key and value are one
product; and on a CPU dropout masks cost a tenth (``dropout.py``). Models with anything unusual in them (adapters, other
positions, other activations) are left to the library.

And it can do what the library cannot: let a layer pass on only the tokens that its attention looked at most (as PoWER-BERT
does, Goyal et al. 2020), so that the layers above have less to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


def forward(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, kept: Sequence[int | None] = ()
) -> torch.Tensor:
    """Logits [batch, classes].

    ``input_ids``: int64 [batch, tokens], padded on the right; ``attention_mask``: the same shape, 0 at padding.
    ``kept``: of each layer, how many tokens it passes on at most, the first among them; None: all. Nothing: all of all.
    """
    return _forward(model, input_ids, attention_mask, kept, lambda state, order: None)


def watched(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, kept: Sequence[int | None] = ()
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """As ``forward``; and of each layer the state that it passes on, [batch, some, width], and which tokens these are, int64
    [batch, some], if any were left out. The last layer computes the first token alone."""
    states: list[torch.Tensor] = []
    places: list[torch.Tensor] = []

    def note(state: torch.Tensor, order: torch.Tensor | None) -> None:
        before = places[-1] if places else torch.arange(state.shape[1], device=state.device).expand(state.shape[:2])
        states.append(state)
        places.append(before[:, : state.shape[1]] if order is None else before.gather(1, order))

    logits = _forward(model, input_ids, attention_mask, kept, note)
    return logits, states, places if kept else []


def layer_count(model: Any) -> int:
    """Of a model that is supported."""
    return len(list(FAMILIES[type(model).__name__].layers(model)))


def _forward(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, kept: Sequence[int | None],
    note: Callable[[torch.Tensor, torch.Tensor | None], None],
) -> torch.Tensor:  # fmt: skip
    """``note`` is called with the state after each layer, and which of the tokens before are in it if others are not; nobody
    else keeps it."""
    family = FAMILIES[type(model).__name__]
    embeddings, training = family.embeddings(model), model.training
    state = embeddings.LayerNorm(family.sum_embeddings(model, input_ids))
    state = dropout(state, embeddings.dropout.p, training)
    visible = None if bool(attention_mask.all()) else attention_mask.bool()[:, None, None, :]
    activation, layers = _ACTIVATIONS[family.activation(model)], list(family.layers(model))
    for layer, most in zip(layers[:-1], kept or [None] * len(layers), strict=False):
        order = None
        if most is None:
            state = _attend(layer, state, state, visible, training)
        else:
            state, visible, order = _attend_to_some(layer, state, visible, training, most)
        state = _feed_forward(layer, state, activation, training)
        note(state, order)
    # The head reads the first token alone, so the last layer asks for no other; it still attends to all.
    first = _attend(layers[-1], state[:, :1], state, visible, training)
    first = _feed_forward(layers[-1], first, activation, training)
    note(first, None)
    return family.head(model, first.squeeze(1))


def _attend(
    layer: Layer, asking: torch.Tensor, state: torch.Tensor, visible: torch.Tensor | None, training: bool
) -> torch.Tensor:
    """Self-attention with residual and norm, of the tokens ``asking`` [batch, some or all, width]."""
    if asking is state:
        query, key, value = _heads(layer, _together(state, layer.query, layer.key, layer.value))
    else:
        query, key, value = _heads(layer, (layer.query(asking), *_together(state, layer.key, layer.value)))
    probability = layer.attention_dropout if training else 0.0
    if probability and state.device.type == "cpu":  # the library's kernel would draw its masks one by one
        mixed = dropout(_attention(query, key, visible), probability, training=True) @ value
    else:
        mixed = functional.scaled_dot_product_attention(query, key, value, visible, probability)
    return _attended(layer, mixed.transpose(1, 2).flatten(2), asking, training)


def _attend_to_some(
    layer: Layer, state: torch.Tensor, visible: torch.Tensor | None, training: bool, most: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The same of the ``most`` tokens that all tokens and heads together attended most, which of those are visible, and which
    of ``state`` they are.

    The first comes first; the others in no order of the text, which nothing above depends on.
    """
    query, key, value = _heads(layer, _together(state, layer.query, layer.key, layer.value))
    weights = _attention(query, key, visible)
    # What padding looks at counts for nothing.
    asked = weights if visible is None else weights * visible.transpose(-1, -2)
    attended = asked.float().sum((1, 2))
    if torch.compiler.is_exporting():  # else it would take texts for as long, or as short, as the example's
        most = torch.sym_min(most, attended.shape[1])
    first = torch.full_like(attended[:, :1], torch.inf)
    order = torch.cat([first, attended[:, 1:]], 1).argsort(1, descending=True)[:, :most]
    mixed = dropout(weights, layer.attention_dropout, training) @ value
    state, mixed = (_rows(part, order) for part in (state, mixed.transpose(1, 2).flatten(2)))
    if visible is not None:
        visible = visible.gather(-1, order[:, None, None, :])
    return _attended(layer, mixed, state, training), visible, order


def _rows(state: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[batch, tokens, width], int64 [batch, some] -> [batch, some, width]. As a table's rows: runtimes copy these at once, and
    what ``gather`` gives value by value."""
    batch, tokens = state.shape[:2]
    offsets = torch.arange(batch, device=state.device)[:, None] * tokens
    return functional.embedding(order + offsets, state.flatten(0, 1))


def _heads(layer: Layer, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[batch, tokens, heads * width] -> [batch, heads, tokens, width]."""
    return [part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in parts]


def _together(state: torch.Tensor, *linears: nn.Linear) -> tuple[torch.Tensor, ...]:
    """Several linear layers of the same input as one product: small products use a processor badly."""
    weight, bias = torch.cat([layer.weight for layer in linears]), torch.cat([layer.bias for layer in linears])
    return functional.linear(state, weight, bias).split([layer.out_features for layer in linears], dim=-1)


def _attention(query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Weights [batch, heads, queries, keys], as the two matrices and the softmax have them, step by step."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if visible is not None:
        # Added, not filled in: that is vectorised, and its backward pass is nothing.
        scores = scores + torch.zeros_like(visible, dtype=scores.dtype).masked_fill(
            ~visible, torch.finfo(scores.dtype).min
        )
    return scores.softmax(-1).to(query.dtype)


def _attended(layer: Layer, mixed: torch.Tensor, asking: torch.Tensor, training: bool) -> torch.Tensor:
    """What attention gave [batch, tokens, heads * width], through the layer's own matrix, with residual and norm."""
    normed: torch.Tensor = layer.out_norm(dropout(layer.out(mixed), layer.out_dropout, training) + asking)
    return normed


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
