"""Costs are measured side by side from the raw input on, and memory in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_networks import image_network, save_around, text_network

from orchestrator.compression.cost import Costs, folder_bytes, measure_beside, parity
from orchestrator.compression.probe import peak_rss_bytes
from orchestrator.errors import CompressionFailed

TEXTS = ["the coffee was great", "stale", "we bought this box of tea and it is bland", "my dog is happy"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> dict[str, Path]:
    """A small and a larger one."""
    folders = {}
    for name, layers in (("small", 1), ("large", 24)):
        folders[name] = tmp_path_factory.mktemp(name)
        text_network(words=60, layers=layers).save(folders[name])
        save_around(folders[name], tiny_backbone)
    return folders


def test_the_larger_model_costs_more(models: dict[str, Path]) -> None:
    threads = torch.get_num_threads()
    costs = measure_beside(models, TEXTS, batch_size=6, threads=1, rounds=3, probe=False)
    assert list(costs) == list(models)
    small, large = costs["small"], costs["large"]
    assert 0 < 2 * small.latency_ms_p50 < large.latency_ms_p50
    assert small.latency_ms_p50 <= small.latency_ms_p95 and 2 * small.batch_ms_p50 < large.batch_ms_p50
    assert large.throughput_per_s == pytest.approx(6e3 / large.batch_ms_p50)
    assert small.size_bytes == sum(path.stat().st_size for path in models["small"].iterdir()) < large.size_bytes
    assert small.load_s > 0 and small.peak_rss_bytes == 0
    assert torch.get_num_threads() == threads


def test_pictures_are_measured_from_their_files_on(tmp_path: Path, shapes_folder: Path) -> None:
    image_network().save(tmp_path)
    save_around(tmp_path, None)
    contents = [path.read_bytes() for path in sorted(shapes_folder.rglob("*.png"))[:3]]
    (costs,) = measure_beside({"it": tmp_path}, contents, batch_size=2, threads=1, rounds=1).values()
    assert isinstance(costs, Costs) and costs.latency_ms_p50 > 0
    assert 0 < costs.load_s < 60 and costs.peak_rss_bytes > 50_000_000


def test_the_probe_says_one_line_of_json_and_counts_its_own_memory_alone(models: dict[str, Path]) -> None:
    ballast = np.ones(200_000_000, np.int64)  # 1.6 GB, more than the probe takes
    command = [sys.executable, "-m", "orchestrator.compression.probe", str(models["small"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found.keys() == {"load_s", "peak_rss_bytes"} and found["load_s"] > 0
    assert 50_000_000 < found["peak_rss_bytes"] < ballast.nbytes < peak_rss_bytes()


def test_a_model_that_cannot_be_loaded_is_said(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CompressionFailed, match=str(tmp_path)) as caught:
        measure_beside({"broken": tmp_path}, TEXTS, batch_size=1, threads=1, rounds=1)
    assert "\n" not in str(caught.value)


def test_parity_of_answers() -> None:
    one = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], np.float32)
    other = np.array([[0.8, 0.2], [0.6, 0.4], [0.2, 0.8]], np.float32)
    found = parity(one, other)
    assert found.max_difference == pytest.approx(0.2, abs=1e-6)
    assert found.mean_difference == pytest.approx(0.1, abs=1e-6)
    assert found.agreement == pytest.approx(2 / 3)
    assert parity(one, one) == type(found)(0.0, 0.0, 1.0)


def test_bytes_of_a_folder_are_those_of_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "one").write_bytes(b"123")
    (tmp_path / "deep" / "two").write_bytes(b"4567")
    assert folder_bytes(tmp_path) == 7
