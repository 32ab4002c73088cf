"""Compiled programs in a cache that several processes use, without a compiler."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.models import compiled
from orchestrator.models.compiled import CompiledNetwork


@pytest.fixture
def compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was compiled: files that hold nothing."""
    made: list[Path] = []

    def compile_(folder: Path, answering: Any, package: Path) -> None:
        package.parent.mkdir(parents=True, exist_ok=True)
        package.touch()
        made.append(package)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_key", lambda folder: "program")
    monkeypatch.setattr(compiled, "_compile", compile_)
    monkeypatch.setattr(compiled.Answering, "read", lambda folder: None)
    monkeypatch.setattr(CompiledNetwork, "__init__", lambda self, answering, run: setattr(self, "run", run))
    return made


def load(monkeypatch: pytest.MonkeyPatch, how: Any) -> Any:
    monkeypatch.setattr(torch._inductor, "aoti_load_package", how)
    return CompiledNetwork.load(Path("anywhere")).run


def test_what_another_process_forgets_while_it_is_loaded_is_compiled_again(
    compiles: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(monkeypatch, lambda path: "machine code") == "machine code" and len(compiles) == 1
    tries: list[str] = []

    def forgotten_once(path: str) -> str:
        tries.append(path)
        if len(tries) == 1:
            Path(path).unlink()
            raise RuntimeError("Failed to initialize zip archive: file open failed")
        return "machine code"

    assert load(monkeypatch, forgotten_once) == "machine code" and len(compiles) == 2


def test_what_is_there_and_cannot_be_loaded_is_said(compiles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> None:
        raise RuntimeError("undefined symbol")

    with pytest.raises(RuntimeError, match="undefined symbol"):
        load(monkeypatch, broken)
    assert len(compiles) == 1


def test_one_that_is_used_is_touched_before_it_is_loaded(compiles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, lambda path: "machine code")
    os.utime(compiles[0], (1, 1))
    assert load(monkeypatch, lambda path: Path(path).stat().st_mtime) > 1


def test_two_processes_may_forget_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        (tmp_path / f"{number}.pt2").touch()
    listed = sorted(tmp_path.iterdir())
    listed[3].unlink()  # by the other, after this one has listed the folder
    monkeypatch.setattr(Path, "glob", lambda *_: listed)
    compiled._forget(tmp_path)
    assert len(list(tmp_path.iterdir())) == 16
