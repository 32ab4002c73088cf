"""The kept answers come back as they were written, and pictures are what the network saw."""

import base64
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from orchestrator.data.dataset import Split, write_split
from orchestrator.evaluation.predictions import (
    picture_of,
    read_predictions,
    read_samples,
    write_predictions,
    write_samples,
)
from orchestrator.storage import ROWS


def split_of(folder: Path, columns: dict[str, pa.Array], labels: list[int]) -> Split:
    """A prepared split that holds all of these rows, in this order."""
    table = pa.table(columns)
    with pa.OSFile(str(folder / ROWS), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    write_split(folder, "test", np.arange(len(labels)), np.array(labels, np.int32), np.arange(len(labels)))
    return Split(folder, "test")


def test_predictions_come_back_as_they_were_written(tmp_path: Path) -> None:
    columns = {"row": pa.array([7, 3, 9], pa.int64()), "raw": pa.array(["x", "y", "z"])}
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], dtype=np.float32)
    path = tmp_path / "predictions.parquet"
    write_predictions(path, split_of(tmp_path, columns, [0, 1, 1]), probabilities, ["no", "yes"])
    assert [part.tolist() for part in read_predictions(path)] == [[7, 3, 9], [0, 1, 1], [0, 0, 1]]
    kept = pq.read_table(path).to_pydict()
    assert (kept["label"], kept["predicted"]) == (["no", "yes", "yes"], ["no", "no", "yes"])
    np.testing.assert_allclose(kept["probability:yes"], probabilities[:, 1])


def test_samples_are_what_a_client_would_send_and_get(tmp_path: Path) -> None:
    count = 100
    columns = {"row": pa.array(range(count)), "raw": pa.array([f"text {n}" for n in range(count)])}
    probabilities = np.linspace(0.0, 1.0, count, dtype=np.float32)[:, None] * [1.0, -1.0] + [0.0, 1.0]
    path = tmp_path / "samples.json"
    write_samples(path, split_of(tmp_path, columns, [0] * count), probabilities, ["no", "yes"], None)
    samples = read_samples(path)
    assert len(samples) == 32
    assert samples[0] == {"input": "text 0", "scores": {"no": 0.0, "yes": 1.0}}
    assert samples[-1] == {"input": "text 99", "scores": {"no": 1.0, "yes": 0.0}}
    assert read_samples(tmp_path / "of an older version") == []


def test_samples_of_images_are_pictures(tmp_path: Path) -> None:
    columns = {"row": pa.array([0, 1]), "raw": pa.array(["a.png", "b.png"]),
               "pixels": pa.array([bytes(16 * 16 * 3)] * 2, pa.binary(16 * 16 * 3))}  # fmt: skip
    path = tmp_path / "samples.json"
    write_samples(path, split_of(tmp_path, columns, [0, 1]), np.eye(2, dtype=np.float32), ["a", "b"], 16)
    samples = read_samples(path)
    assert [sample["scores"]["a"] for sample in samples] == [1.0, 0.0]
    assert Image.open(io.BytesIO(base64.b64decode(samples[0]["input"]["b64"]))).size == (16, 16)


def test_a_picture_is_what_the_network_saw(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    columns = {"row": pa.array([0, 1]), "raw": pa.array(["a.png", "b.png"]),
               "pixels": pa.array([p.tobytes() for p in pixels], pa.binary(16 * 16 * 3))}  # fmt: skip
    picture = picture_of(split_of(tmp_path, columns, [0, 1]), 1, 16)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(picture))), pixels[1])
