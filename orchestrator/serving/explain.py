"""Why a saved model answered what it did: what each word of a text, or each patch of an image, does for a label's score.

In: a ``Predictor``, one raw input and a label. Out: an ``Explanation``. Knows no HTTP and no Ray.

Occlusion hides one part after the other and notes how far the score falls. It only asks the model, so it works in every
form. Integrated gradients (Sundararajan, Taly & Yan 2017) adds up the score's gradient on the straight way from the input
with everything hidden to the input as it is: a part gets its share of the difference of the two scores, also where two
words say the same and hiding either changes nothing. It takes a torch network.

Hidden means the same to both. A word's tokens become the mask token, or the unknown one where a tokenizer has no mask: the
others keep their places, and a cut text is cut where it was, which taking the word out would change. A patch becomes the mean
colour that images are normalised with.

The integral and the ablation of patches are captum's. Words are hidden by hand: that is three lines, and needs no package.
"""

from __future__ import annotations

import importlib
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import pyarrow as pa
import torch
from torch.utils.hooks import RemovableHandle

from orchestrator.data.combined import encoders_of, named
from orchestrator.data.encoder import Encoder
from orchestrator.data.images import ImageEncoder
from orchestrator.data.text import TextEncoder
from orchestrator.errors import UserError
from orchestrator.models.backbones import EnsembleNetwork, Network
from orchestrator.models.runtimes import RuntimeNetwork, is_installed
from orchestrator.serving.contract import Input
from orchestrator.serving.predictor import Predictor
from orchestrator.serving.words import merged, words_of

TOLERANCE = 0.02
"""Of a probability: how far the integrated gradients' sum may be from the difference of the two scores."""
STEPS = (32, 128)
"""Points on the way; the second number where the first misses the tolerance, as with some networks of ReLUs."""
_MAX_SIDE = 14
_LEAST_PARTS = 3
"""The rows that are computed beside the parts must find room in ``max_parts``."""
_GRADIENT_ROWS = 8
"""Rows per pass there and back, at most: a backward pass keeps what a prediction forgets."""
_PACKAGE = "captum"

Method = Literal["occlusion", "integrated_gradients"]
Asked = Literal["auto", "occlusion", "integrated_gradients"]


@dataclass(frozen=True)
class TextPart:
    """A word, punctuation, or neighbouring ones of a text with more than there is room for."""

    text: str
    start: int
    """Characters of the text that was sent, ``text`` being ``[start:end]`` of it."""
    end: int
    weight: float
    """How far the score falls when the part is hidden, or the gradients' share; negative: it speaks against the label."""


@dataclass(frozen=True)
class Explanation:
    """``parts`` for a text, ``heatmap`` for an image, None for the other."""

    method: Method
    label: str
    """Whose score is explained."""
    score: float
    """The label's probability, as the endpoint answers it."""
    baseline_score: float
    """Its probability when everything is hidden. Integrated gradients add up to ``score - baseline_score``."""
    parts: list[TextPart] | None
    """In the text's order; between them is white space only. What lies behind ``max_tokens`` is one part of weight 0."""
    heatmap: list[list[float]] | None
    """Weights of a square grid, at most 14 x 14, rows from the top and columns from the left, over the picture as the model saw
    it: of the upright image, W x H pixels, the square of side s = min(W, H) in the centre. Of n x n cells, the one in row r
    and column c begins s * c / n pixels to the right of (W - s) / 2 and s * r / n below (H - s) / 2."""


class ExplanationRefused(UserError, ValueError):
    """There is no such explanation of this input by this model."""


def explain(
    predictor: Predictor, value: Input, label: str | None = None, method: Asked = "auto", max_parts: int = 128
) -> Explanation:
    """What in ``value`` the score of ``label`` hangs on.

    ``label``: None: the predicted one. ``method``: ``auto`` takes integrated gradients where the model has gradients, captum is
    installed and they add up to within ``TOLERANCE``; else occlusion. ``max_parts``: at least 3. Occlusion computes at most
    ``max_parts + 1`` rows: the parts, the input as it is, and with everything hidden. Integrated gradients compute the two
    ends and ``STEPS[0]`` rows there and back, ``STEPS[1]`` more if they must; of an ensemble, each member does.

    The model stays as it is, and other threads may predict with it meanwhile.

    Raises ExplanationRefused.
    """
    if method not in get_args(Asked):
        raise ExplanationRefused(f"there is no method {method!r}", f"known are {', '.join(get_args(Asked))}")
    if max_parts < _LEAST_PARTS:
        raise ExplanationRefused(f"max_parts is {max_parts}", f"take at least {_LEAST_PARTS}")
    probabilities = _answered(predictor, value)
    index = int(np.argmax(probabilities)) if label is None else _known(label, predictor.model.labels)
    label, score = predictor.model.labels[index], probabilities[index]
    reading = _read(predictor, value, max_parts)
    for steps in STEPS if _takes_gradients(predictor.model.network, method) else ():
        with predictor.model.autocast():
            weights, baseline, gap = _integrated(predictor, reading, index, steps)
        if gap <= TOLERANCE:
            return Explanation("integrated_gradients", label, score, baseline, *reading.shown(weights))
    if method == "integrated_gradients":
        raise ExplanationRefused(
            f"the gradients add up to {gap:.3f} more or less than the score differs, which is more than {TOLERANCE}",
            "ask for the method 'occlusion', or 'auto'",
        )
    with predictor.model.autocast():
        weights, baseline = reading.occluded(predictor, index, score)
    return Explanation("occlusion", label, score, baseline, *reading.shown(weights))


# ------------------------------------------------------------------------------------------------------------ refusing


def _answered(predictor: Predictor, value: Input) -> list[float]:
    """Probabilities of the input as it is. Raises ExplanationRefused where the model has none."""
    kind = predictor.model.encoder.kind
    if isinstance(value, str) != (kind == "text"):
        raise ExplanationRefused(f"the model classifies {kind}s, but got {type(value).__name__}", f"send it one {kind}")
    if isinstance(value, str) and (broken := re.search("[\ud800-\udfff]", value)):
        raise ExplanationRefused(
            f"the text holds half a surrogate pair at character {broken.start()}", "send a text that is Unicode"
        )
    prediction = predictor.predict([value])[0]
    if prediction.probabilities is None:
        raise ExplanationRefused(f"the {kind} {prediction.error}", "send one that the model can answer to")
    return prediction.probabilities


def _known(label: str, labels: Sequence[str]) -> int:
    if label not in labels:
        known = ", ".join(labels[:20])
        raise ExplanationRefused(f"the model has no label {label[:80]!r}", f"name one of {known}, or none")
    return labels.index(label)


def _takes_gradients(network: Network, method: Asked) -> bool:
    """Raises ExplanationRefused where the method is asked for, and cannot be."""
    why_not = _why_no_gradients(network)
    if method == "auto":
        return not why_not and is_installed(_PACKAGE)
    if method == "integrated_gradients" and why_not:
        raise ExplanationRefused(why_not, "ask for the method 'occlusion', or 'auto'")
    return method == "integrated_gradients"


def _why_no_gradients(network: Network) -> str:
    """Nothing where a score has gradients that add up to it."""
    runtimes = [module for module in network.modules() if isinstance(module, RuntimeNetwork)]
    if runtimes:
        return f"this model is saved in a form that has no gradients ({runtimes[0].answering.library})"
    mixtures = [
        module.mixture for module in network.modules() if isinstance(module, EnsembleNetwork) and module.mixture
    ]
    if any(mixture.combine == "vote" for mixture in mixtures):
        return "this model's members vote, and a vote has no gradients"
    if any(len(set(mixture.encoders)) > 1 for mixture in mixtures):
        return "this model's members see an input in different ways"
    return ""


def _captum() -> Any:
    """captum.attr, imported now: it draws in matplotlib, and takes a second."""
    try:
        return importlib.import_module(f"{_PACKAGE}.attr")
    except ImportError as error:
        raise ExplanationRefused(
            f"this explanation needs the package {_PACKAGE}, which cannot be imported ({error})",
            "pip install 'ray-orchestrator[explain]'",
        ) from None


# --------------------------------------------------------------------------------------------------------------- texts


@dataclass(frozen=True)
class _Tokens:
    """A text as one encoder cuts it."""

    ids: np.ndarray
    """int32 [tokens], special ones included."""
    shares: np.ndarray
    """[tokens, parts]: how much of a token is a part's. A row adds up to 1, that of a special token to 0."""
    stand_in: int
    """The token that hidden ones become."""

    def hidden(self, parts: np.ndarray) -> np.ndarray:
        """The tokens without those of these parts."""
        return np.where(self.shares[:, parts].any(1), self.stand_in, self.ids)


@dataclass(frozen=True)
class _Words:
    """A text as tokens, and which of its parts they belong to."""

    text: str
    spans: list[tuple[int, int]]
    """Characters of each part."""
    tokens: tuple[_Tokens, ...]
    """For each encoder; all but ensembles have one."""
    encoder: Encoder

    def ends(self) -> dict[str, torch.Tensor]:
        """The network's inputs, two rows: everything hidden, and nothing."""
        return self.encoder.collate(self._table([self._read, self._read[:0]]))

    def occluded(self, predictor: Predictor, label: int, score: float) -> tuple[np.ndarray, float]:
        """Weights [parts], and the score with everything hidden."""
        rows = self._table([self._read, *self._read[:, None]])
        baseline, *scores = predictor.probabilities(rows)[:, label].tolist()
        weights = np.zeros(len(self.spans))
        weights[self._read] = score - np.array(scores)
        return weights, baseline

    def weighed(self, attributions: torch.Tensor) -> np.ndarray:
        """Of word embeddings [tokens and padding, width], where there is one encoder -> [parts]."""
        (tokens,) = self.tokens
        of_tokens: np.ndarray = attributions.sum(-1).double().cpu().numpy()[: len(tokens.ids)]
        return np.asarray(of_tokens @ tokens.shares)

    def shown(self, weights: np.ndarray) -> tuple[list[TextPart], None]:
        spans = zip(self.spans, weights.tolist(), strict=True)
        return [TextPart(self.text[start:end], start, end, weight) for (start, end), weight in spans], None

    @property
    def _read(self) -> np.ndarray:
        """Parts that the model reads anything of: hiding others changes nothing."""
        return np.flatnonzero(np.any([tokens.shares.any(0) for tokens in self.tokens], axis=0))

    def _table(self, hidden: Iterable[np.ndarray]) -> pa.Table:
        """A row for each of these choices of parts, with which they are hidden."""
        kind, choices = pa.list_(pa.int32()), list(hidden)
        columns = {
            named("input_ids", number): pa.array([tokens.hidden(parts) for parts in choices], kind)
            for number, tokens in enumerate(self.tokens)
        }
        return pa.table(columns)


def _read_text(encoder: Encoder, text: str, max_parts: int) -> _Words:
    encoders = cast(tuple[TextEncoder, ...], encoders_of(encoder))
    encodings = [each._backend.encode(text) for each in encoders]
    words, rest = words_of(text, max(_seen(encoding, text) for encoding in encodings))
    spans = merged(words, max_parts - 1 - len(rest)) + rest
    tokens = [
        _Tokens(np.array(encoding.ids, np.int32), _shares(*_offsets(encoding), spans), _stand_in(each))
        for each, encoding in zip(encoders, encodings, strict=True)
    ]
    return _Words(text, spans, tuple(tokens), encoder)


def _seen(encoding: Any, text: str) -> int:
    """Characters up to the last that is read."""
    offsets, special = _offsets(encoding)
    return int(offsets[~special].max(initial=0)) if encoding.overflowing else len(text)


def _offsets(encoding: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of each token its characters [tokens, 2], and whether it is a special one."""
    return np.array(encoding.offsets).reshape(-1, 2), np.array(encoding.special_tokens_mask, bool)


def _shares(offsets: np.ndarray, special: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """By common characters; what has none, such as white space, goes to the part before. ``offsets``: [tokens, 2]."""
    if not spans:
        return np.zeros((len(offsets), 0))
    (first, after), (starts, ends) = offsets.T, np.array(spans).T
    common = np.minimum(after[:, None], ends) - np.maximum(first[:, None], starts)
    shares = common.clip(0).astype(float)
    alone = np.flatnonzero(shares.sum(1) == 0)
    shares[alone, (np.searchsorted(starts, first[alone], "right") - 1).clip(0)] = 1.0
    shares /= shares.sum(1, keepdims=True)
    shares[special] = 0.0
    return shares


def _stand_in(encoder: TextEncoder) -> int:
    """Never the padding token: some networks count positions, or look for the last word, by it."""
    tokenizer = encoder.tokenizer
    blank = encoder._backend.encode(" ", add_special_tokens=False).ids  # of those that know every byte, and no mask
    for token in (tokenizer.mask_token_id, tokenizer.unk_token_id, *blank):
        if token is not None and token != tokenizer.pad_token_id:
            return int(token)
    raise ExplanationRefused("the tokenizer has no token that could stand for a hidden word", "use another backbone")


# -------------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class _Patches:
    """An image as the model sees it, cut into a grid."""

    pixels: dict[str, torch.Tensor]
    """By name, float32 [1, 3, size, size], normalised: the mean colour is 0. All but ensembles have one of them."""
    cells: dict[str, torch.Tensor]
    """int64 [size, size]: which cell a pixel is in, row by row."""
    side: int
    """Cells in a row, and rows."""

    def ends(self) -> dict[str, torch.Tensor]:
        """The network's inputs, two rows: everything hidden, and nothing."""
        return {name: torch.cat([torch.zeros_like(seen), seen]) for name, seen in self.pixels.items()}

    def occluded(self, predictor: Predictor, label: int, score: float) -> tuple[np.ndarray, float]:
        """Weights [side, side], and the score with everything hidden."""

        def scores(shown: torch.Tensor) -> torch.Tensor:
            """``shown``: [rows, cells], 0 for a hidden one."""
            inputs = {name: seen * shown[:, self.cells[name]][:, None] for name, seen in self.pixels.items()}
            return _scores(predictor.model.network, inputs, label)

        all_shown = torch.ones(1, self.side**2, device=predictor.model.device)
        with torch.no_grad():
            baseline = float(scores(torch.zeros_like(all_shown)))
        falls = _captum().FeatureAblation(scores).attribute(all_shown, perturbations_per_eval=predictor.max_batch_size)
        return falls.view(self.side, self.side).double().cpu().numpy(), baseline

    def weighed(self, attributions: torch.Tensor) -> np.ndarray:
        """Of pixels [3, size, size], where there is one encoder -> [side, side]."""
        sums = torch.bincount(self.cells["pixels"].flatten().cpu(), attributions.sum(0).flatten().double().cpu())
        return np.asarray(sums.view(self.side, self.side).numpy())

    def shown(self, weights: np.ndarray) -> tuple[None, list[list[float]]]:
        return None, weights.tolist()


def _read_image(encoder: ImageEncoder, content: bytes, device: torch.device, max_parts: int) -> _Patches:
    pixels = {
        name: seen.to(device) for name, seen in encoder.collate(pa.table(encoder.encode([content]).columns)).items()
    }
    sizes = {name: seen.shape[-1] for name, seen in pixels.items()}
    side = min(_MAX_SIDE, *sizes.values(), math.isqrt(max_parts - 2))  # the ablation computes the image once more
    lines = {name: torch.arange(size, device=device) * side // size for name, size in sizes.items()}
    return _Patches(pixels, {name: line[:, None] * side + line for name, line in lines.items()}, side)


def _read(predictor: Predictor, value: Input, max_parts: int) -> _Words | _Patches:
    model = predictor.model
    if isinstance(value, str):
        return _read_text(model.encoder, value, max_parts)
    return _read_image(cast(ImageEncoder, model.encoder), value, model.device, max_parts)


# ------------------------------------------------------------------------------------------------ integrated gradients


def _integrated(
    predictor: Predictor, reading: _Words | _Patches, label: int, steps: int
) -> tuple[np.ndarray, float, float]:
    """Weights, the score with everything hidden, and how far the sum is from what it should be.

    An ensemble's score is the (weighted) mean of its members', so the weights are too, though each member has embeddings of
    its own.
    """
    model = predictor.model
    ends = {name: tensor.to(model.device) for name, tensor in reading.ends().items()}
    batch = min(predictor.max_batch_size, _GRADIENT_ROWS)
    members = list(_members(model.network, label))
    paths = [_along_the_way(member, ends, own, steps, batch) for member, own, _ in members]
    shares = [share for _, _, share in members]
    weights = np.average([reading.weighed(attributions) for attributions, _ in paths], axis=0, weights=shares)
    low, high = np.average([scores for _, scores in paths], axis=0, weights=shares).tolist()
    return weights, low, abs(float(weights.sum()) - (high - low))


def _along_the_way(
    network: Network, ends: dict[str, torch.Tensor], label: int, steps: int, batch: int
) -> tuple[torch.Tensor, list[float]]:
    """Attributions of what the network goes on from: word embeddings [tokens, width], or pixels [3, size, size]; and the
    scores of both ``ends``."""
    rows: list[torch.Tensor] = []

    def watch(moved: torch.Tensor) -> torch.Tensor:
        rows.append(moved)
        return moved

    def scores(moved: torch.Tensor) -> torch.Tensor:
        inputs = {name: tensor[1:].expand(len(moved), *tensor.shape[1:]) for name, tensor in ends.items()}
        with _moving(network, lambda _: moved):
            return _scores(network, inputs, label)

    with torch.no_grad(), _moving(network, watch):
        both = _scores(network, ends, label).tolist()
    hidden, whole = rows[0].split(1)
    attributions = _captum().IntegratedGradients(scores).attribute(
        whole, baselines=hidden, n_steps=steps, internal_batch_size=batch
    )  # fmt: skip
    return attributions[0], both


def _moving(network: Network, move: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
    """``network.moving`` for this thread alone."""
    here = threading.get_ident()
    return network.moving(lambda rows: move(rows) if threading.get_ident() == here else rows)


def _members(network: Network, label: int, share: float = 1.0) -> Iterator[tuple[Network, int, float]]:
    """The networks that it is made of, itself alone if it is no ensemble; with the place of the label among their own, and
    their share in the answer."""
    if not isinstance(network, EnsembleNetwork):
        yield network, label, share
        return
    for number, member in enumerate(cast(list[Network], list(network.members))):
        mixture = network.mixture
        own = mixture.orders[number][label] if mixture else label
        weight = mixture.weights[number] if mixture else 1.0 / len(network.members)
        yield from _members(member, own, share * weight)


def _scores(network: Network, inputs: dict[str, torch.Tensor], label: int) -> torch.Tensor:
    """The label's probabilities [rows]."""
    probabilities: torch.Tensor = network(**inputs).float().softmax(dim=-1)
    return probabilities[:, label]
