"""The fast forward pass gives the library's logits and gradients, or leaves the model to the library."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from orchestrator.data.torchvision_ops import ensure_torchvision
from orchestrator.models import post_norm

ensure_torchvision()
SIZES = {"vocab_size": 60, "pad_token_id": 1, "num_labels": 3}
TWO_LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def classifier(family: str, dropout: float = 0.1, **changes: object) -> nn.Module:
    import transformers

    if family == "DistilBert":
        config = transformers.DistilBertConfig(
            **SIZES, dim=16, n_layers=2, n_heads=4, hidden_dim=24, dropout=dropout, attention_dropout=dropout,
            seq_classif_dropout=dropout, **changes,
        )  # fmt: skip
    else:
        config = getattr(transformers, f"{family}Config")(
            **SIZES, **TWO_LAYERS | changes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
        )
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{family}ForSequenceClassification")(config)
    for parameter in model.parameters():  # biases and norms start as zeros and ones, which would hide a mix-up
        nn.init.normal_(parameter, std=0.3)
    return model


def batch(*lengths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 60, mask.shape, generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


FAMILIES = ("Bert", "Roberta", "XLMRoberta", "DistilBert")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(7, 7), (9, 4, 1), (1,)], ids=str)
def test_logits_are_the_librarys(family: str, lengths: tuple[int, ...]) -> None:
    model, inputs = classifier(family).eval(), batch(*lengths)
    assert post_norm.is_supported(model)
    with torch.no_grad():
        torch.testing.assert_close(post_norm.forward(model, **inputs), model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_a_padding_token_inside_a_text_shifts_no_more_than_it_does_in_the_library() -> None:
    model, inputs = classifier("Roberta").eval(), batch(9, 4)
    inputs["input_ids"][0, 3] = 1
    with torch.no_grad():
        torch.testing.assert_close(post_norm.forward(model, **inputs), model(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_librarys(family: str) -> None:
    model, inputs = classifier(family, dropout=0.0).train(), batch(9, 4, 6)
    gradients = []
    for logits in (post_norm.forward(model, **inputs), model(**inputs).logits):
        model.zero_grad()
        functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(
            gradient, gradients[1][name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_attention_step_by_step_is_attention() -> None:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(3, 2, 5, 4, generator=generator) for _ in range(3))
    visible = (torch.arange(5) < torch.tensor([5, 3, 1])[:, None])[:, None, None, :]
    mixed = post_norm._attention(query, key, visible) @ value
    torch.testing.assert_close(mixed, functional.scaled_dot_product_attention(query, key, value, visible))


# ------------------------------------------------------------------------------------------------- tokens left out

FOUR_LAYERS = {"num_hidden_layers": 4}


def with_tokens_left_out(model: nn.Module, ids: torch.Tensor, kept: list[int | None]) -> torch.Tensor:
    """Logits of one BERT text, by the library's own layers: between two of them, the tokens go that were attended least."""
    model.set_attn_implementation("eager")  # type: ignore[operator]
    bert, watched = model.bert, []
    state = bert.embeddings(input_ids=ids)  # type: ignore[union-attr, operator]
    for layer, most in zip(bert.encoder.layer, kept, strict=True):  # type: ignore[union-attr, arg-type]
        hook = layer.attention.self.register_forward_hook(lambda _, __, result: watched.append(result[1]))
        state = layer(state)
        state = state[0] if isinstance(state, tuple) else state
        hook.remove()
        if most is not None:
            attended = watched[-1].sum((0, 1, 2))
            others = [int(token) for token in attended.argsort(descending=True) if token != 0]
            state = state[:, [0, *others[: most - 1]]]
    logits: torch.Tensor = model.classifier(bert.pooler(state))  # type: ignore[union-attr, operator]
    return logits


@pytest.mark.parametrize("kept", [[None, 5, None, None], [6, 4, 2, None], [None, None, 1, None]], ids=str)
def test_layers_pass_on_the_tokens_that_were_attended_most(kept: list[int | None]) -> None:
    model, inputs = classifier("Bert", **FOUR_LAYERS).eval(), batch(9)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:  # type: ignore[union-attr]
            layer.attention.self.query.weight.mul_(10)  # at random, all tokens are attended alike
        ours, whole = (post_norm.forward(model, **inputs, kept=plan) for plan in (kept, ()))
        torch.testing.assert_close(ours, with_tokens_left_out(model, inputs["input_ids"], kept), rtol=1e-5, atol=1e-5)
    assert (ours - whole).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_where_all_tokens_are_passed_on_nothing_changes(family: str) -> None:
    model, inputs = classifier(family).eval(), batch(9, 4, 1)
    with torch.no_grad():
        for most in (9, 200):
            ours = post_norm.forward(model, **inputs, kept=(most, most))
            torch.testing.assert_close(ours, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_padding_is_never_passed_on_before_a_token_and_has_no_say() -> None:
    model, inputs, kept = classifier("Bert", **FOUR_LAYERS).eval(), batch(12, 5, 3), (7, 4, 2, None)
    with torch.no_grad():
        together = post_norm.forward(model, **inputs, kept=kept)
        for row, length in enumerate((12, 5, 3)):
            alone = {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}
            torch.testing.assert_close(
                together[row : row + 1], post_norm.forward(model, **alone, kept=kept), rtol=1e-5, atol=1e-5
            )


def test_of_the_tokens_that_are_passed_on_it_is_told_which_they_are() -> None:
    model, inputs = classifier("Bert", **FOUR_LAYERS).eval(), batch(9, 4, 6)
    with torch.no_grad():
        logits, states, places = post_norm.watched(model, **inputs, kept=(None, 4, 2, None))
        _, whole, nothing = post_norm.watched(model, **inputs)
        torch.testing.assert_close(logits, post_norm.forward(model, **inputs, kept=(None, 4, 2, None)), rtol=0, atol=0)
    assert nothing == []
    assert [tuple(state.shape) for state in states] == [(3, 9, 16), (3, 4, 16), (3, 2, 16), (3, 1, 16)]
    assert [tuple(place.shape) for place in places] == [(3, 9), (3, 4), (3, 2), (3, 1)]
    assert bool((places[0] == torch.arange(9)).all()) and all(bool((place[:, 0] == 0).all()) for place in places)
    for row in range(3):  # what the second layer made of these tokens is what it makes of them among all
        torch.testing.assert_close(states[1][row], whole[1][row, places[1][row]], rtol=1e-5, atol=1e-5)
        assert set(places[2][row].tolist()) < set(places[1][row].tolist())


def test_gradients_reach_every_parameter_of_a_model_that_leaves_tokens_out() -> None:
    model, inputs = classifier("Bert", **FOUR_LAYERS).train(), batch(9, 4, 6)
    logits = post_norm.forward(model, **inputs, kept=(None, 4, 2, None))
    functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        if not name.endswith("key.bias"):  # which softmax leaves without effect
            assert parameter.grad.abs().sum() > 0, name


def test_in_training_logits_differ_by_dropout_and_repeat_with_the_seed() -> None:
    model, inputs = classifier("Bert").train(), batch(9, 4)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(post_norm.forward(model, **inputs))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_in_training_the_mean_over_masks_is_near_the_logits_without_dropout() -> None:
    """Every dropout of the library's is applied, none twice: checked by the spread of the logits too."""
    model, inputs = classifier("Bert", dropout=0.2).train(), batch(9, 4)
    with torch.no_grad():
        ours = torch.stack([post_norm.forward(model, **inputs) for _ in range(1500)])
        theirs = torch.stack([model(**inputs).logits for _ in range(1500)])
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 0.2 * spread).all()
    torch.testing.assert_close(ours.std(0), spread, rtol=0.12, atol=0.0)


class Adapted(nn.Linear):
    """Stands for what LoRA or quantisation puts in a linear layer's place."""


def test_what_is_unusual_is_left_to_the_library() -> None:
    import transformers

    adapted = classifier("Bert")
    adapted.bert.encoder.layer[1].output.dense = Adapted(24, 16)
    assert not post_norm.is_supported(adapted)
    assert not post_norm.is_supported(classifier("Bert", hidden_act="silu"))
    assert not post_norm.is_supported(classifier("Bert", is_decoder=True))
    checkpointing = classifier("Bert")
    checkpointing.gradient_checkpointing_enable()
    assert not post_norm.is_supported(checkpointing)
    electra = transformers.ElectraConfig(**SIZES, **TWO_LAYERS, embedding_size=16)
    assert not post_norm.is_supported(transformers.ElectraForSequenceClassification(electra))
