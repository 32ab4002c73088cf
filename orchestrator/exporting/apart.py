"""Converting a network in a process of its own, so that a runtime's library can break without breaking anything else.

    python -m orchestrator.exporting.apart FORM FOLDER

In: a folder with the network as it saves itself, and the batches. Out: the form's files beside them. What such libraries
do to a process: end it by a signal, print pages, warn, log, wrap functions of torch, keep gigabytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import CompressionFailed, OrchestratorError
from orchestrator.exporting.tracing import Batch, quiet
from orchestrator.models.backbones import Network, load_network

_MODULE = "orchestrator.exporting.apart"
_NETWORK, _BATCHES, _FORM, _REASON = "network", "batches.safetensors", "form", "reason.json"
_TIMEOUT_S = 1800.0
_REASON_CHARACTERS = 300


def convert_apart(form: str, network: Network, batches: Sequence[Batch], folder: Path) -> None:
    """Write the form into ``folder``, by another process. Raises CompressionFailed if that fails, crashes or hangs."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        work = Path(scratch)
        for name in (_NETWORK, _FORM):
            (work / name).mkdir()
        with quiet():
            network.save(work / _NETWORK)
        save_file({f"{i}.{name}": tensor.cpu().contiguous() for i, batch in enumerate(batches)
                   for name, tensor in batch.items()}, work / _BATCHES)  # fmt: skip
        _run(form, work)
        for file in (work / _FORM).iterdir():
            file.rename(folder / file.name)


def _run(form: str, work: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run([sys.executable, "-m", _MODULE, form, str(work)], env=environment, check=False,
                              timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _failed(form, f"its library was not done after {_TIMEOUT_S:.0f} s") from None
    if done.returncode == 0:
        return
    if (work / _REASON).is_file():
        raise _error(**json.loads((work / _REASON).read_text(encoding="utf-8")))
    if done.returncode < 0:
        raise _failed(form, f"its library ended the process with {signal.Signals(-done.returncode).name}")
    raise _failed(form, _first_line(done.stderr.decode(errors="replace").strip().splitlines()[-1:]))


def _error(message: str, next_step: str, number: int | None) -> Exception:
    """``number``: of the system's error that it was, such as that of a full disk."""
    return OSError(number, message) if number is not None else CompressionFailed(message, next_step)


@contextlib.contextmanager
def failing_clearly(form: str) -> Iterator[None]:
    """Whatever a library raises inside, as CompressionFailed; the system's own errors, such as a full disk, as they are."""
    try:
        yield
    except (OrchestratorError, OSError):
        raise
    except Exception as error:
        raise _failed(form, _first_line(str(error).splitlines()) or type(error).__name__) from error


def _failed(form: str, reason: str) -> CompressionFailed:
    return CompressionFailed(f"this network cannot be given the form {form} ({reason})", "choose another form")


def _first_line(lines: Sequence[str]) -> str:
    """The first one that says something."""
    telling = [line.strip() for line in lines if any(character.isalpha() for character in line)]
    return telling[0][:_REASON_CHARACTERS] if telling else ""


def main(form: str, work: Path) -> None:
    from orchestrator.exporting.forms import FORMS

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        with failing_clearly(form):
            FORMS[form].convert(load_network(work / _NETWORK), _batches(work / _BATCHES), work / _FORM)
    except OrchestratorError as error:
        _give_up(work, error.message, error.next_step, None)
    except OSError as error:
        _give_up(work, error.strerror or str(error), "", error.errno)


def _give_up(work: Path, message: str, next_step: str, number: int | None) -> None:
    reason = {"message": message, "next_step": next_step, "number": number}
    (work / _REASON).write_text(json.dumps(reason), encoding="utf-8")
    sys.exit(1)


def _batches(file: Path) -> list[Batch]:
    batches: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(file).items():
        number, _, name = key.partition(".")
        batches.setdefault(int(number), {})[name] = tensor
    return [batches[number] for number in sorted(batches)]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
