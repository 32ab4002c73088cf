"""What the user sees while a stage works: a live line on a terminal, plain lines elsewhere, always on standard error.

In: ``Event`` values from any stage. Knows nothing of what the stages do.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


@dataclass(frozen=True)
class Event:
    """``done`` of ``total`` (in ``unit``) of a stage, with figures to show; or, with ``message``, a line to keep."""

    stage: str
    message: str = ""
    done: float = 0.0
    total: float = 0.0
    figures: Mapping[str, float | int | str] = field(default_factory=dict)
    table: tuple[tuple[str, ...], ...] = ()
    """Of what goes on side by side, its head first: a live display shows it above the bar."""


Report = Callable[[Event], None]


def ignore(event: Event) -> None:
    """For callers that show nothing."""


class Together:
    """Several runs of one stage as one: their progress summed up, their lines with the run's name before them.

    Runs may report from threads of their own. A run that has not reported yet is taken to be as long as the others.
    """

    def __init__(self, names: Iterable[str], report: Report) -> None:
        self._fractions, self._totals = dict.fromkeys(names, 0.0), dict[str, float]()
        self._report, self._lock, self._closed = report, threading.Lock(), False

    def report_of(self, name: str) -> Report:
        def report(event: Event) -> None:
            with self._lock:
                if not self._closed:
                    self._report(self._summed_up(name, event))

        return report

    def close(self) -> None:
        """Nothing is reported from now on."""
        with self._lock:
            self._closed = True

    def _summed_up(self, name: str, event: Event) -> Event:
        if event.message:
            return replace(event, message=f"{name}: {event.message}")
        if event.total:
            self._fractions[name], self._totals[name] = event.done / event.total, event.total
        length = sum(self._totals.values()) / max(1, len(self._totals))
        done, total = length * sum(self._fractions.values()), length * len(self._fractions)
        return replace(event, done=done, total=total, figures={"run": name, **event.figures})


class Display(Protocol):
    def __enter__(self) -> Report: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def display(*, quiet: bool = False) -> Display:
    """A live display if standard error is a terminal, else plain lines."""
    if quiet:
        return _Lines(every_s=float("inf"), keep_messages=False)
    return _Live() if sys.stderr.isatty() else _Lines()


def format_figures(figures: Mapping[str, float | int | str]) -> str:
    return "  ".join(f"{name} {_short(value)}" for name, value in figures.items())


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class _Lines:
    """One line per message, and one per ``every_s`` seconds of progress."""

    def __init__(self, every_s: float = 5.0, keep_messages: bool = True) -> None:
        self.every_s, self.keep_messages = every_s, keep_messages
        self.printed = 0.0
        self.first, self.first_at = Event(""), 0.0  # of this stage's progress: what was there before took no time now

    def __enter__(self) -> Report:
        return self.report

    def __exit__(self, *exception: object) -> None:
        pass

    def report(self, event: Event) -> None:
        now = time.monotonic()
        if event.message:
            if self.keep_messages:
                self._print(f"[{event.stage}] {event.message}")
            return
        if event.stage != self.first.stage or event.done < self.first.done:
            self.first, self.first_at = event, now
        if now - self.printed >= self.every_s:
            self.printed = now
            self._print(self._progress(event, now - self.first_at))

    def _progress(self, event: Event, elapsed_s: float) -> str:
        total = f"/{event.total:.0f}" if event.total else ""
        line = f"[{event.stage}] {event.done:.0f}{total}  {format_figures(event.figures)}"
        progress = event.done - self.first.done
        if not event.total or not progress:
            return line
        return f"{line}  left {format_seconds(elapsed_s * (event.total - event.done) / progress)}"

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201


class _Live:
    """A bar per running stage, above it a table if the stage has one, and the lines to keep."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.stage, self.bar, self.table = "", TaskID(-1), tuple[tuple[str, ...], ...]()
        self.live = Live(console=self.console, transient=True, get_renderable=self._shown)

    def __enter__(self) -> Report:
        self.live.start()
        return self.report

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def _shown(self) -> Group:
        if not self.table:
            return Group(self.bars)
        table = Table(*self.table[0], box=None, header_style="dim", padding=(0, 2, 0, 0))
        for row in self.table[1:]:
            table.add_row(*(escape(cell) for cell in row))
        return Group(table, self.bars)

    def report(self, event: Event) -> None:
        if event.message:
            self.console.print(f"[bold]{event.stage:>9}[/]  {escape(event.message)}", highlight=False)
            return
        if event.stage != self.stage:
            if self.stage:
                self.bars.remove_task(self.bar)
            self.stage = event.stage
            self.bar = self.bars.add_task(event.stage, total=event.total or None, figures="")
        self.table = event.table
        self.bars.update(
            self.bar, completed=event.done, total=event.total or None, figures=format_figures(event.figures)
        )
