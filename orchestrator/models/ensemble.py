"""What an ensemble of networks answers, how its members' weights are fitted, and how far they are from each other. Pure.

Deep ensembles (Lakshminarayanan, Pritzel & Blundell 2017): the same network trained from different seeds; the answer is the
mean of the members' probabilities. What the mean is unsure of while each member is sure is the members' disagreement.
An ensemble of registered versions is a ``Mixture``: its members have weights, may vote, may have their labels in another order
and may see an input in different ways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, Self

import numpy as np
import torch

from orchestrator.records import Disagreement

Combine = Literal["mean", "vote"]
_TIE = 1e-3
"""Of votes: the share that the mean of the probabilities has in the answer, so that it decides between labels with as many."""
_GAP = 1e-6
"""Of fitted weights: how far at most the mean log-likelihood is from the best there is, in nats."""
_LEAST_LIKELIHOOD = 1e-12
_MAX_STEPS = 20_000


@dataclass(frozen=True)
class Mixture:
    """How networks answer as one; all tuples have a value per member."""

    weights: tuple[float, ...]
    """At least 0, together 1."""
    orders: tuple[tuple[int, ...], ...]
    """Of each label of the ensemble, its place among the member's own."""
    encoders: tuple[int, ...]
    """Number of the encoder whose tensors the member takes, as ``data.combined`` names them."""
    combine: Combine = "mean"

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Self:
        """What ``settings`` gave, from JSON. Raises KeyError."""
        return cls(tuple(settings["weights"]), tuple(tuple(order) for order in settings["orders"]),
                   tuple(settings["encoders"]), settings["combine"])  # fmt: skip

    def settings(self) -> dict[str, Any]:
        return {"weights": list(self.weights), "orders": [list(order) for order in self.orders],
                "encoders": list(self.encoders), "combine": self.combine}  # fmt: skip

    def answer(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Each member's logits [batch, classes], in its own order of labels -> log of the probabilities, fp32 [batch, classes].

        ``mean``: the weighted mean of the members' probabilities. ``vote``: of each label, the weights of the members that hold
        it for the most probable; a thousandth of the answer is the mean, which decides where two labels have as many votes.
        """
        each = torch.stack([member.float()[:, list(order)] for member, order in zip(logits, self.orders, strict=True)])
        weights = torch.tensor(self.weights, device=each.device)[:, None, None]
        mean = (each.log_softmax(dim=-1) + weights.log()).logsumexp(dim=0)
        if self.combine == "mean":
            return mean
        votes = torch.nn.functional.one_hot(each.argmax(dim=-1), each.shape[-1])
        shares = (votes * weights).sum(dim=0)
        return torch.logaddexp((shares * (1.0 - _TIE)).log(), mean + math.log(_TIE))

    def probabilities(self, answers: np.ndarray) -> np.ndarray:
        """``answers``: probabilities [members, rows, classes], each member's in its own order -> of all [rows, classes]."""
        logits = torch.from_numpy(answers).double().clamp_min(1e-300).log()
        result: np.ndarray = self.answer(list(logits)).exp().numpy()
        return result


def log_mean_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Logits [members, batch, classes] -> log of the mean probabilities, fp32 [batch, classes].

    In the log domain throughout: a class that all members hold for impossible gets a large negative number, not
    log(0). Softmax of the result gives back the mean.
    """
    each = logits.float().log_softmax(dim=-1)
    return each.logsumexp(dim=0) - math.log(len(logits))


def fitted_weights(likelihoods: np.ndarray) -> np.ndarray:
    """Weights [members] of the mixture under which the labels are most likely. ``likelihoods``: [members, rows], each member's
    probability of the row's true label.

    Expectation maximisation for mixture weights (Dempster, Laird & Rubin 1977), from equal ones: no step makes the labels less
    likely, and as their log-likelihood is concave in the weights, the end is its maximum. The largest gain of any member tells
    how far that is at most.
    """
    known = np.maximum(likelihoods.astype(np.float64), _LEAST_LIKELIHOOD)
    weights = np.full(len(known), 1.0 / len(known))
    for _ in range(_MAX_STEPS):
        gains = gains_of(known, weights)
        if gains.max() - 1.0 <= _GAP:
            break
        weights = weights * gains
    return np.asarray(weights / weights.sum())


def gains_of(likelihoods: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What a step of expectation maximisation multiplies each weight by, [members]."""
    return np.asarray((likelihoods / (weights @ likelihoods)).mean(axis=1))


def disagreement(probabilities: np.ndarray, weights: Sequence[float] | None = None) -> Disagreement:
    """``probabilities``: [members, rows, classes], at least two members and one row. ``weights``: of the members, or equal."""
    labels, mean = probabilities.argmax(axis=2), np.average(probabilities, axis=0, weights=weights)
    pairs = [float((one != other).mean()) for one, other in combinations(labels, 2)]
    of_mean, of_members = (
        float(_entropy(mean).mean()),
        float(np.average(_entropy(probabilities).mean(axis=1), weights=weights)),
    )
    return Disagreement(labels=float(np.mean(pairs)), predictive_entropy=of_mean, member_entropy=of_members,
                        mutual_information=max(0.0, of_mean - of_members))  # fmt: skip


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """In nats, over the last axis; 0 log 0 is 0."""
    values = probabilities.astype(np.float64)
    terms: np.ndarray = np.where(values > 0.0, values * np.log(np.where(values > 0.0, values, 1.0)), 0.0)
    entropy: np.ndarray = -terms.sum(axis=-1)
    return entropy
