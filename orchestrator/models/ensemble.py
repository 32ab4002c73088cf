"""What an ensemble of networks answers, and how far its members are from each other. Pure.

Deep ensembles (Lakshminarayanan, Pritzel & Blundell 2017): the same network trained from different seeds; the answer is the
mean of the members' probabilities. What the mean is unsure of while each member is sure is the members' disagreement.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import torch

from orchestrator.records import Disagreement


def log_mean_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Logits [members, batch, classes] -> log of the mean probabilities, fp32 [batch, classes].

    In the log domain throughout: a class that all members hold for impossible gets a large negative number, not
    log(0). Softmax of the result gives back the mean.
    """
    each = logits.float().log_softmax(dim=-1)
    return each.logsumexp(dim=0) - math.log(len(logits))


def disagreement(probabilities: np.ndarray) -> Disagreement:
    """``probabilities``: [members, rows, classes], at least two members and one row."""
    labels, mean = probabilities.argmax(axis=2), probabilities.mean(axis=0)
    pairs = [float((one != other).mean()) for one, other in combinations(labels, 2)]
    of_mean, of_members = float(_entropy(mean).mean()), float(_entropy(probabilities).mean())
    return Disagreement(labels=float(np.mean(pairs)), predictive_entropy=of_mean, member_entropy=of_members,
                        mutual_information=max(0.0, of_mean - of_members))  # fmt: skip


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """In nats, over the last axis; 0 log 0 is 0."""
    values = probabilities.astype(np.float64)
    terms: np.ndarray = np.where(values > 0.0, values * np.log(np.where(values > 0.0, values, 1.0)), 0.0)
    entropy: np.ndarray = -terms.sum(axis=-1)
    return entropy
