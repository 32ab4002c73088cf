"""Differential privacy by DP-SGD (Abadi et al. 2016): what one training row can change in the weights is bounded, and drowned
in noise.

In: a network and the parts of a batch that was drawn by chance. Out: gradients that may be shown, and the epsilon that they
have cost. Only here is opacus known, which is an optional package: it gives the norm of each row's gradient without the
gradient itself (ghost clipping, Li et al. 2022), and the Rényi accountant (Mironov et al. 2019).
"""

from __future__ import annotations

import contextlib
import math
import secrets
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from orchestrator.errors import DataError, RecipeError
from orchestrator.recipe import Privacy
from orchestrator.training.failure import Diverged
from orchestrator.training.loop import MicroBatch, RowLosses


@dataclass(frozen=True)
class Noise:
    """What makes a run private, the same on all workers and after a stop."""

    secret: int
    """Of the draw of rows and of the noise, 128 bits: whoever knows it can take the noise away again. It is random and not
    the recipe's seed, which many know."""
    multiplier: float
    """Standard deviation of the noise, in norms that a row's gradient is clipped to."""

    @classmethod
    def agreed(cls, privacy: Privacy, rate: float, steps: int, world: int) -> Noise:
        """Drawn by the first worker. ``rate``: the probability that a row is in a batch."""
        values: list[Any] = [None, None]
        if world == 1 or distributed.get_rank() == 0:
            values = [secrets.randbits(128), noise_multiplier(privacy, rate, steps)]
        if world > 1:
            distributed.broadcast_object_list(values)
        return cls(*values)


def noise_multiplier(privacy: Privacy, rate: float, steps: int) -> float:
    """The least noise with which all steps together spend no more than ``privacy.epsilon``.

    Raises:
        RecipeError: no noise is enough; opacus is not installed.
    """
    _opacus()
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with _without_warnings():  # that a wider search might find an even lower bound
            found: float = get_noise_multiplier(
                target_epsilon=privacy.epsilon, target_delta=privacy.delta, sample_rate=rate, steps=steps,
                accountant="rdp", epsilon_tolerance=min(0.01, privacy.epsilon / 100),
            )  # fmt: skip
    except ValueError:
        raise RecipeError(
            f"training.privacy: no noise keeps {steps} steps below epsilon {privacy.epsilon:g}", "give more epsilon"
        ) from None
    return found


def epsilon_spent(privacy: Privacy, multiplier: float, rate: float, steps: int) -> float:
    """After so many steps, an upper bound."""
    _opacus()
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(multiplier, rate, steps)] if steps else []
    with _without_warnings():
        return float(accountant.get_epsilon(privacy.delta))


def check_privacy(privacy: Privacy, rows: int) -> None:
    """Raises RecipeError: opacus is not installed. DataError: with delta 1 / rows, showing some row as it is would be
    private."""
    _opacus()
    if privacy.delta >= 1.0 / rows:
        raise DataError(
            f"training.privacy.delta is {privacy.delta:g}, which promises nothing for {rows} training rows",
            f"set it below 1 / {rows}, such as {0.1 / rows:.1g}",
        )


def draw_batches(rows: int, batch_size: int, secret: int, epoch: int) -> list[np.ndarray]:
    """One epoch's batches of row indices: each row is in each batch with probability ``sample_rate``, so that batches differ in
    size, and a row may be in several or in none: the accountant counts on that."""
    generator = np.random.default_rng([secret, epoch])
    rate = sample_rate(rows, batch_size)
    return [np.flatnonzero(generator.random(rows) < rate) for _ in range(-(-rows // batch_size))]


def sample_rate(rows: int, batch_size: int) -> float:
    return min(1.0, batch_size / rows)


def freeze_batch_norms(network: nn.Module) -> None:
    """They mix rows; frozen, they use their running statistics. The network's ``train`` sees to the rest."""
    for norm in network.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.requires_grad_(False)
    network.train()


class PrivateGradients:
    """The step of DP-SGD up to the optimiser: clipped row by row, summed over all workers, with noise."""

    def __init__(self, network: nn.Module, noise: Noise, max_norm: float, batch_size: int) -> None:
        """``batch_size``: how many rows a batch has on average."""
        _opacus()
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping

        self.network, self.noise, self.max_norm, self.batch_size = network, noise, max_norm, batch_size
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        _look_up_for_each_row(network)
        # Not strict: that would refuse any buffer, those of frozen batch norms too.
        self._norms = GradSampleHooksFastGradientClipping(
            network, loss_reduction="sum", strict=False, max_grad_norm=max_norm
        )

    def step(
        self, micro_batches: Iterable[MicroBatch], row_losses: RowLosses, seed: int, world: int
    ) -> tuple[float, float]:
        """Leaves the gradients of one step on the parameters; returns this worker's share of the loss, and their norm.

        Raises:
            Diverged: the gradients are no numbers, on every worker alike.
        """
        total = torch.zeros(sum(p.numel() for p in self.parameters), device=self.parameters[0].device)
        loss_sum = 0.0
        for batch in micro_batches:
            loss, clipped = self._clipped_sum(batch, row_losses)
            loss_sum, total = loss_sum + loss, total.add_(clipped)
        if world == 1 or distributed.get_rank() == 0:
            total.add_(self._draw(total, seed))
        if world > 1:
            distributed.all_reduce(total)
        total.div_(self.batch_size)
        norm = float(total.norm())
        if not math.isfinite(norm):
            raise Diverged(f"the loss is {loss_sum / self.batch_size:g} and the norm of the gradients {norm:g}")
        self._give(total)
        return loss_sum / self.batch_size, norm

    def _clipped_sum(self, batch: MicroBatch, row_losses: RowLosses) -> tuple[float, torch.Tensor]:
        """The sum of the rows' losses, and of their gradients, each scaled down to ``max_norm``."""
        self._norms.enable_hooks()
        losses = row_losses(self.network(**batch.inputs).float(), batch.labels) * batch.weights
        with _without_warnings():  # of hooks on the first layer, whose inputs need no gradients
            losses.sum().backward(retain_graph=True)  # only for the norms, which the hooks take on the way
            scale = self._norms.get_clipping_coef().detach()
            self._norms.disable_hooks()
            gradients = torch.autograd.grad((losses * scale).sum(), self.parameters)
        return float(losses.detach().sum()), torch.cat([gradient.reshape(-1) for gradient in gradients])

    def _draw(self, like: torch.Tensor, seed: int) -> torch.Tensor:
        generator = torch.Generator(like.device).manual_seed(seed)
        deviation = self.noise.multiplier * self.max_norm
        return torch.randn(like.shape, generator=generator, device=like.device) * deviation

    def _give(self, total: torch.Tensor) -> None:
        parts = total.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def _look_up_for_each_row(network: nn.Module) -> None:
    """Positions are the same in all rows, so networks look them up once, as a batch of one: no row's own gradient would be
    seen there."""
    rows = 0

    def note(_: nn.Module, __: tuple[Any, ...], inputs: dict[str, torch.Tensor]) -> None:
        nonlocal rows
        rows = len(next(iter(inputs.values())))

    def repeat(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if len(args[0]) not in (1, rows):
            raise RecipeError("training.privacy: this backbone looks embeddings up for no row", "choose another")
        return (args[0].expand(rows, *args[0].shape[1:]).contiguous(),)

    network.register_forward_pre_hook(note, with_kwargs=True)
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(repeat)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _opacus() -> None:
    try:
        import opacus  # noqa: F401
    except ImportError:
        raise RecipeError(
            "training.privacy needs the package opacus, which is not installed",
            "pip install 'ray-orchestrator[privacy]'",
        ) from None
