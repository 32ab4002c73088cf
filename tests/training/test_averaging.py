"""The average is the mean it says, buffers included, and goes on where it stood."""

import copy
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from orchestrator.recipe import Averaging
from orchestrator.training.averaging import Average


class Tiny(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.full((3,), 7.0), requires_grad=False)
        self.register_buffer("running_mean", torch.full((2,), value * 10, dtype=torch.float64))
        self.register_buffer("num_batches_tracked", torch.tensor(int(value)))


VALUES = [1.0, 4.0, 2.0, 8.0, 5.0]


def averaged(settings: Averaging, values: list[float] = VALUES) -> Average:
    average = Average(Tiny(0.0), settings, total_steps=len(values))
    for step, value in enumerate(values):
        average.update(Tiny(value), step)
    return average


def test_ema_is_the_weighted_mean_with_the_starts_bias_taken_out() -> None:
    decay = 0.8
    shares = [decay ** (len(VALUES) - 1 - index) for index in range(len(VALUES))]
    expected = sum(share * value for share, value in zip(shares, VALUES, strict=True)) / sum(shares)
    network = averaged(Averaging(kind="ema", decay=decay)).network
    assert network.weight.tolist() == pytest.approx([expected] * 3)
    assert network.running_mean.tolist() == pytest.approx([expected * 10] * 2), "batch-norm statistics too"
    assert int(network.num_batches_tracked) == 5
    assert network.frozen.tolist() == [7.0] * 3


def test_after_one_step_ema_is_that_steps_weights_to_the_bit() -> None:
    assert torch.equal(averaged(Averaging(decay=0.999), [0.1]).network.weight, Tiny(0.1).weight)


def test_swa_is_the_mean_of_the_steps_after_its_start() -> None:
    network = averaged(Averaging(kind="swa", start_fraction=0.4)).network
    assert network.weight.tolist() == pytest.approx([(2.0 + 8.0 + 5.0) / 3] * 3)


def test_before_its_start_swa_is_the_weights_themselves() -> None:
    average = Average(Tiny(0.0), Averaging(kind="swa", start_fraction=0.9), total_steps=100)
    for step, value in enumerate(VALUES):
        average.update(Tiny(value), step)
    assert torch.equal(average.network.weight, Tiny(5.0).weight)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_an_average_that_was_saved_goes_on_to_the_same_values(kind: str) -> None:
    settings = Averaging(kind=kind, decay=0.8, start_fraction=0.2)
    first = Average(Tiny(0.0), settings, total_steps=5)
    for step, value in enumerate(VALUES[:3]):
        first.update(Tiny(value), step)
    second = Average(Tiny(0.0), settings, total_steps=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step, value in enumerate(VALUES[3:], start=3):
        second.update(Tiny(value), step)
    assert torch.equal(second.network.weight, averaged(settings).network.weight)


def test_all_workers_validate_with_the_first_ones_statistics(tmp_path: Path) -> None:
    """Each has seen other rows; a run that goes on has only the first one's."""
    context = multiprocessing.get_context("forkserver")  # a fork may share a broken lock of its parent
    workers = [context.Process(target=_agree, args=(rank, tmp_path / "meeting")) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]


def _agree(rank: int, meeting: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    average = Average(Tiny(float(rank + 3)), Averaging(), total_steps=5)
    assert average.network.running_mean.tolist() == [10.0 * (rank + 3)] * 2
    average.agree()
    assert average.network.running_mean.tolist() == [30.0] * 2
    distributed.destroy_process_group()
