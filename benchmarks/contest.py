"""A contest of trainers: the same rows, model, batch and seed for each, in processes of their own, taking turns.

What ``train.py`` and ``train_images.py`` have in common: the project's own two contenders (through Ray, and its loop without
Ray), measuring, the table and the ratios. Speed is that of the steady state, from the ninth step to the last; quality is
macro-F1 on the same test rows with its bootstrap interval; memory is that of all processes of a contender together.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from orchestrator.data.dataset import Split
from orchestrator.data.encoder import Encoder
from orchestrator.data.torchvision_ops import ensure_torchvision

BATCH, SEED, SKIPPED_STEPS = 32, 17, 8
"""Of the first steps: there the system hands out memory, which on some virtual machines takes as long as the step itself."""


@dataclass(frozen=True)
class Job:
    """What every contender gets."""

    storage: str
    dataset: str
    """The prepared dataset's folder."""
    recipe: dict[str, Any]
    """The project's; the others take their settings from it."""
    labels: tuple[str, ...]
    device: str
    rows: int | None
    """Training rows; None: all."""

    @property
    def steps(self) -> int:
        return math.ceil(len(self.train_rows) / BATCH)

    @property
    def train_rows(self) -> np.ndarray:
        rows = len(Split(Path(self.dataset), "train"))
        return np.arange(rows if self.rows is None else min(self.rows, rows))


Result = dict[str, Any]
"""``times`` (seconds at the end of each step), ``padding`` (share of the tokens), ``probabilities`` of the test rows."""

Contenders = Mapping[str, tuple[Callable[[Job], Result | None], int]]
"""Name -> what it runs, and by how many processes torchrun starts it (0: it starts its own)."""


@dataclass(frozen=True)
class Contest:
    name: str
    script: str
    contenders: Callable[[str, int], Contenders]
    """Device, and how many cores or GPUs there are."""
    prepare: Callable[[Path, str, int | None], Job]
    """A folder to work in, device, rows."""
    bound: Callable[[Job], float]
    """Samples/s that the hardware's matrix products would allow."""
    quick_rows: int


# ------------------------------------------------------------------------------------------------------- our contenders


def ours(slots: int) -> Contenders:
    """The project as its users run it, and its loop in bare processes; with one worker, and with one per slot."""
    found: dict[str, tuple[Callable[[Job], Result | None], int]] = {
        "loop without ray": (lambda job: loop_without_ray(job, workers=1), 0),
        "orchestrator": (lambda job: orchestrator_on_ray(job, workers=1), 0),
    }
    if slots > 1:
        found["orchestrator ddp"] = (lambda job: orchestrator_on_ray(job, workers=slots), 0)
        found["loop without ray ddp"] = (lambda job: loop_without_ray(job, workers=slots), slots)
    return found


def orchestrator_on_ray(job: Job, *, workers: int | str) -> Result:
    """The project as its users run it, from the recipe, on a Ray instance of its own."""
    from orchestrator.pipeline import Pipeline

    with Pipeline(recipe_of(job, workers)) as pipeline:
        record: Any = pipeline.walk("train")
        run, used = pipeline.storage.path(record.location), record.workers
    return outcome(job, run, used)


def loop_without_ray(job: Job, *, workers: int) -> Result | None:
    """The same loop as the project's, its processes started by torchrun."""
    from torch import distributed

    from orchestrator.models.hardware import keep_freed_memory
    from orchestrator.storage import Storage
    from orchestrator.training.worker import Place, TrainJob, train_worker

    keep_freed_memory()
    if workers > 1:
        distributed.init_process_group("nccl" if job.device == "cuda" else "gloo")
    rank = distributed.get_rank() if workers > 1 else 0
    device = torch.device("cuda", rank) if job.device == "cuda" else torch.device("cpu")
    recipe, storage = recipe_of(job, workers), Storage(job.storage)
    run = f"train/loop-{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"
    dataset = str(Path(job.dataset).relative_to(storage.base))
    train_worker(TrainJob(recipe, run, dataset, job.labels), Place(rank, workers, device), lambda event: None)
    return outcome(job, storage.path(run), workers) if rank == 0 else None


def recipe_of(job: Job, workers: int | str) -> Any:
    from orchestrator.recipe import Recipe

    training = job.recipe["training"] | {"workers": workers, "device": job.device}
    return Recipe.model_validate(job.recipe | {"storage": job.storage, "training": training})


def prepared(recipe: dict[str, Any], root: Path, device: str, rows: int | None) -> Job:
    """The job whose dataset the project has prepared."""
    from orchestrator.pipeline import Pipeline

    job = Job(str(root / "runs"), "", recipe, (), device, rows)
    with Pipeline(recipe_of(job, 1)) as pipeline:
        record: Any = pipeline.walk("prepare")
        folder = pipeline.storage.path(record.location)
    return replace(job, dataset=str(folder), labels=record.labels)


def outcome(job: Job, run: Path, workers: int) -> Result:
    from orchestrator.data.batches import plan_epoch, share
    from orchestrator.data.encoders import load_encoder
    from orchestrator.models.checkpoint import load_model
    from orchestrator.storage import METRICS, MODEL
    from orchestrator.training.metrics_log import read_metrics

    folder = Path(job.dataset)
    train, encoder = Split(folder, "train"), load_encoder(folder / "encoder")
    plan = plan_epoch(train.lengths(encoder), train.labels, batch_size=BATCH, seed=SEED, epoch=0)
    shares = [share(batch, rank, workers) for batch in plan for rank in range(workers)]
    model, test = load_model(run / MODEL, device=job.device), Split(folder, "test")
    probabilities = [model.probabilities(test.inputs(rows)) for rows in np.array_split(np.arange(len(test)), 16)]
    return {
        "times": [line["time"] for line in read_metrics(run / METRICS) if line["kind"] == "train"],
        "padding": 0.0 if encoder.kind == "image" else _padding(encoder, train, [rows for rows in shares if len(rows)]),
        "probabilities": np.concatenate(probabilities),
    }


def _padding(encoder: Encoder, rows: Split, batches: Sequence[np.ndarray]) -> float:
    masks = [encoder.collate(rows.inputs(batch))["attention_mask"] for batch in batches]
    return 1.0 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.asarray(logits, np.float32)).softmax(-1).numpy()


# ----------------------------------------------------------------------------------------------------------- measurement


def afresh(job: Job, root: Path, number: int, name: str) -> Job:
    """The same prepared dataset in a storage where nothing has been trained yet."""
    storage = root / f"runs-{number}-{name.replace(' ', '-')}"
    shutil.copytree(job.storage, storage)
    dataset = storage / Path(job.dataset).relative_to(job.storage)
    return replace(job, storage=str(storage), dataset=str(dataset))


def run_contender(script: str, name: str, processes: int, job: Job, root: Path) -> Result:
    """In processes of its own; adds wall-clock seconds and the peak of memory to what it answers."""
    answer, job_file = root / "answer.json", root / "job.json"
    answer.unlink(missing_ok=True)
    job_file.write_text(json.dumps(asdict(job)))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, script, "--contender", name, str(job_file), str(answer)]
    threads = str(max(1, cores() // max(1, processes)))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        peak = PeakMemory(process.pid)
        status = process.wait()
    if status or not answer.exists():
        raise SystemExit(f"{name} failed:\n{(root / 'log').read_text(errors='replace')[-3000:]}")
    result: Result = json.loads(answer.read_text())
    return result | {"wall_s": time.monotonic() - started, "memory_bytes": peak.stop()}


class PeakMemory:
    """Largest sum of proportional set sizes of a process and all below it, looked at every ten seconds: looking costs
    time, of contenders with many processes most."""

    def __init__(self, pid: int) -> None:
        self.root, self.peak_bytes, self.stopped = psutil.Process(pid), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stopped.wait(10.0):
            self.peak_bytes = max(self.peak_bytes, sum(self._sizes()))

    def _sizes(self) -> Iterator[int]:
        try:
            family = [self.root, *self.root.children(recursive=True)]
        except psutil.Error:
            return
        for process in family:
            try:
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            except OSError:  # it has ended
                continue
            yield sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))

    def stop(self) -> int:
        self.stopped.set()
        self.thread.join()
        return self.peak_bytes


def cores() -> int:
    return len(os.sched_getaffinity(0))


def fastest_product(job: Job, *, bf16: bool) -> float:
    """FLOP/s of one large matrix product, the best of twelve."""
    left, right = (
        torch.randn(2048, 2048, device=job.device).to(torch.bfloat16 if bf16 else torch.float32) for _ in "ab"
    )
    seconds = []
    for _ in range(12):
        started = time.perf_counter()
        (left @ right).sum().item()
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds)


def samples_per_s(result: Result, job: Job) -> float:
    times = result["times"]
    rows = len(job.train_rows) - SKIPPED_STEPS * BATCH
    return float(rows / (times[-1] - times[SKIPPED_STEPS - 1]))


def macro_f1(result: Result, job: Job) -> tuple[float, float, float]:
    from orchestrator.evaluation.metrics import summary

    labels, probabilities = Split(Path(job.dataset), "test").labels, np.asarray(result["probabilities"])
    generator = np.random.default_rng(SEED)
    draws = [generator.integers(0, len(labels), len(labels)) for _ in range(500)]
    values = [summary(labels[draw], probabilities[draw])["macro_f1"] for draw in draws]
    return (summary(labels, probabilities)["macro_f1"], *np.quantile(values, [0.025, 0.975]).tolist())


def show(results: dict[str, list[Result]], job: Job, bound: float) -> dict[str, Any]:
    print(f"{'':24}{'samples/s':>10}{'MFU':>6}{'padding':>9}{'memory':>9}{'wall':>7}   macro-F1")
    figures: dict[str, Any] = {"products_alone_per_s": bound}
    for name, rounds in results.items():
        speed = statistics.median(samples_per_s(result, job) for result in rounds)
        score, low, high = macro_f1(rounds[0], job)
        memory, wall = (statistics.median(r[key] for r in rounds) for key in ("memory_bytes", "wall_s"))
        padding = rounds[0]["padding"]
        print(
            f"{name:24}{speed:10.1f}{speed / bound:6.0%}{padding:9.1%}{memory / 1e6:6.0f} MB{wall:5.0f} s   "
            f"{score:.3f} [{low:.3f}, {high:.3f}]"
        )
        figures[name] = {"samples_per_s": speed, "mfu": speed / bound, "padding": padding, "memory_bytes": memory,
                         "wall_s": wall, "macro_f1": [score, low, high]}  # fmt: skip
    print(f"MFU: against {bound:.1f} samples/s, which the fastest matrix product of this machine would allow")
    return figures


def ratios(results: dict[str, list[Result]], job: Job) -> dict[str, float]:
    """Medians over the rounds of the ratios within a round."""

    def ratio(ours: str, theirs: str) -> float:
        pairs = zip(results[ours], results[theirs], strict=True)
        return statistics.median(samples_per_s(a, job) / samples_per_s(b, job) for a, b in pairs)

    peers = [name for name in results if not name.startswith(("orchestrator", "loop"))]
    pairs = [("orchestrator", name) for name in [*peers, "loop without ray"]]
    pairs += [("orchestrator ddp", "loop without ray ddp"), ("orchestrator ddp", "orchestrator")]
    return {f"{a} / {b}": ratio(a, b) for a, b in pairs if a in results and b in results}


def enter(contest: Contest, doc: str) -> None:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer rows and one round: about five minutes on two cores"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="train on this many")
    parser.add_argument("--only", nargs="*", help="these contenders")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        _answer_as(contest, *arguments.contender)
        return
    slots = torch.cuda.device_count() if arguments.device == "cuda" else cores()
    known = contest.contenders(arguments.device, slots)
    chosen = {name: known[name] for name in known if not arguments.only or name in arguments.only}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        job = contest.prepare(root, arguments.device, contest.quick_rows if arguments.quick else arguments.rows)
        results = _take_turns(contest.script, chosen, job, root, 1 if arguments.quick else arguments.rounds)
        figures = show(results, job, contest.bound(job))
        found = ratios(results, job)
    for name, value in found.items():
        print(f"{name:44}{value:6.2f}")
    machine = {
        "cores": cores(),
        "device": arguments.device,
        "processor": platform.processor(),
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": contest.name, "ratios": found, "figures": figures, "machine": machine}))


def _take_turns(script: str, chosen: Contenders, job: Job, root: Path, rounds: int) -> dict[str, list[Result]]:
    """Every other round backwards, so that nobody always follows the same one."""
    results: dict[str, list[Result]] = {name: [] for name in chosen}
    for number in range(rounds):
        for name in list(chosen)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(run_contender(script, name, chosen[name][1], afresh(job, root, number, name), root))
            speed = samples_per_s(results[name][-1], job)
            print(f"round {number + 1}: {name}: {speed:.1f} samples/s", file=sys.stderr)
    return results


def _answer_as(contest: Contest, name: str, job_file: str, answer_file: str) -> None:
    """One contender, in the process that was started for it."""
    ensure_torchvision()
    fields = json.loads(Path(job_file).read_text())
    job = Job(**fields | {"labels": tuple(fields["labels"])})
    slots = torch.cuda.device_count() if job.device == "cuda" else cores()
    result = contest.contenders(job.device, slots)[name][0](job)
    if result is not None:
        result["probabilities"] = np.asarray(result["probabilities"]).tolist()
        Path(answer_file).write_text(json.dumps(result))
