"""What this machine and cluster have, what is missing, what to do. Each finding is a check, its value and a next step."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.data.torchvision_ops import ensure_torchvision, torchvision_is_patched
from orchestrator.errors import OrchestratorError
from orchestrator.session import available_cpus, connect

_PACKAGES = ("ray", "torch", "torchvision", "transformers", "optuna", "pyarrow")
_LOW_DISK_BYTES, _LOW_MEMORY_BYTES = 5_000_000_000, 4_000_000_000


@dataclass(frozen=True)
class Finding:
    check: str
    value: str
    next_step: str = ""
    """Empty: all is well."""


@dataclass(frozen=True)
class Findings:
    findings: tuple[Finding, ...]
    values: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        rows = [{"check": f.check, "value": f.value, "next_step": f.next_step} for f in self.findings]
        object.__setattr__(self, "values", {"stage": "doctor", "healthy": self.healthy, "findings": rows})

    @property
    def healthy(self) -> bool:
        return not any(f.next_step for f in self.findings)

    @property
    def text(self) -> str:
        width = max(len(f.check) for f in self.findings)
        lines = []
        for f in self.findings:
            lines.append(f"{'!' if f.next_step else ' '} {f.check:<{width}}  {f.value}")
            lines += [f"  {'':<{width}}  -> {f.next_step}"] if f.next_step else []
        return "\n".join(lines)


def examine(address: str | None = None) -> Findings:
    """Look at the machine and, with ``address``, at the cluster there."""
    findings = [*_python(), *_packages(), *_hardware(), *_disk()]
    return Findings((*findings, *(_cluster(address) if address else ())))


def _python() -> Iterator[Finding]:
    old = "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer"
    yield Finding("python", f"{platform.python_version()} in {sys.prefix}", old)


def _packages() -> Iterator[Finding]:
    for name in _PACKAGES:
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", f"pip install {name}")
    ensure_torchvision()
    if torchvision_is_patched():
        yield Finding("torchvision ops", "torchvision's compiled operators do not fit this torch; classification works "
                      "without them, detection models would not")  # fmt: skip


def _hardware() -> Iterator[Finding]:
    import torch

    from orchestrator.models.hardware import has_bf16

    bf16 = "bf16 in hardware" if has_bf16(torch.device("cpu")) else "no bf16 in hardware: trains in fp32"
    yield Finding("cpu", f"{available_cpus()} cores, {bf16}")
    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
    driver_but_cpu_torch = shutil.which("nvidia-smi") is not None and not count
    yield Finding("gpu", f"{count} x {names}" if count else "none",
                  "there is an NVIDIA driver, but this torch does not see a GPU: install a CUDA build of torch"
                  if driver_but_cpu_torch else "")  # fmt: skip
    if memory := _available_memory_bytes():
        low = memory < _LOW_MEMORY_BYTES
        yield Finding("memory", f"{memory / 1e9:.1f} GB available",
                      "Ray and two small workers take about 3 GB: free some memory" if low else "")  # fmt: skip


def _available_memory_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    low = "free some space, or put results elsewhere with --storage" if free < _LOW_DISK_BYTES else ""
    yield Finding("disk", f"{free / 1e9:.1f} GB free in {Path.cwd()}", low)


def _cluster(address: str) -> Iterator[Finding]:
    try:
        with connect(address) as session:
            yield Finding("cluster", f"{address}: {session.resources}")
    except OrchestratorError as error:
        yield Finding("cluster", error.message, error.next_step)
