"""A program compiled by torch's inductor, for the processor it runs on.

In: a folder with a program, which holds no machine code. Out: a network. Who loads it compiles it, which takes a C++ compiler
and up to a minute, once on each machine: what comes of it is kept in the cache, below ``~/.cache/orchestrator``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch

from orchestrator.errors import UserError
from orchestrator.models.program import PROGRAM, PROGRAM_WEIGHTS, read_program
from orchestrator.models.runtimes import Answering, RuntimeNetwork
from orchestrator.storage import cache_root, sync_folder

_COMPILERS = ("g++", "clang++", "c++")
_KEPT = 16
"""Compiled programs, those that were used last."""


class CompiledNetwork(RuntimeNetwork):
    """``program.json`` and ``model.safetensors`` as machine code, on the CPU."""

    def __init__(self, answering: Answering, run: Callable[..., torch.Tensor]) -> None:
        super().__init__(answering)
        self._run = run

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises UserError where it was never loaded before and there is no C++ compiler."""
        answering = Answering.read(folder)
        cache = cache_root() / "compiled"
        package = cache / f"{_key(folder)}.pt2"
        try:
            return cls(answering, _loaded(package))
        except FileNotFoundError:  # never compiled here, or just forgotten by another process
            _compile(folder, answering, package)
            _forget(cache)
            return cls(answering, _loaded(package))

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        values = [inputs[name].cpu().contiguous() for name in self.answering.inputs]
        return self._run(*values).to(next(iter(inputs.values())).device)


def _loaded(package: Path) -> Callable[..., torch.Tensor]:
    """Raises FileNotFoundError."""
    os.utime(package)  # first: others do not forget what was used just now
    try:
        run: Callable[..., torch.Tensor] = torch._inductor.aoti_load_package(str(package))
        return run
    except RuntimeError:
        package.stat()  # else one had begun to, and then it is not there
        raise


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), *_COMPILERS) if name)


def _key(folder: Path) -> str:
    """Of the program, and of all that its machine code hangs on."""
    digest = hashlib.sha256(f"{torch.__version__} {_processor()}".encode())
    for name in (PROGRAM, PROGRAM_WEIGHTS):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """Its instructions, where the system names them: a home folder may be shared by different machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _compile(folder: Path, answering: Answering, package: Path) -> None:
    if not has_compiler():
        raise UserError(
            "this model is compiled where it is loaded, and there is no C++ compiler here",
            "install g++ or clang, or compress it to another form: compression.form: torch-fp32",
        )
    example = tuple(_example(shape) for shape in answering.shapes)
    left_open = tuple(
        dict.fromkeys((0, 1) if tensor.ndim == 2 else (0,), torch.export.Dim.DYNAMIC) for tensor in example
    )
    package.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=package.parent) as scratch, warnings.catch_warnings(), torch.no_grad(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")  # of one part of torch to another
        program = torch.export.export(read_program(folder), example, dynamic_shapes=left_open, strict=False)
        # threads: as many as torch has when it answers, not when it was compiled
        options = {"cpp.dynamic_threads": True}
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(scratch) / package.name), inductor_configs=options
        )
        with Path(made).open("rb") as file:
            os.fsync(file.fileno())
        Path(made).replace(package)  # another process may have been as quick
        sync_folder(package.parent)


def _example(shape: tuple[int, ...]) -> torch.Tensor:
    """Token ids and masks have two dimensions, pixels four."""
    return torch.ones(shape, dtype=torch.int64 if len(shape) == 2 else torch.float32)


def _forget(cache: Path) -> None:
    for old in sorted(cache.glob("*.pt2"), key=_last_used, reverse=True)[_KEPT:]:
        old.unlink(missing_ok=True)


def _last_used(file: Path) -> float:
    """Of one that another process forgets just now: never."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
