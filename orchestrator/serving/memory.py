"""What a part of this process takes of the machine's memory, and giving back what is no longer needed.

In: a function that makes something. Out: the thing, and by how much the process grew. Knows neither models nor Ray.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_STATM = Path("/proc/self/statm")


def resident_bytes() -> int | None:
    """Of this process; None where the system does not tell (only Linux does)."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def give_back() -> None:
    """Free what nothing refers to, and return free pages to the system: the C library keeps them otherwise."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # a C library that has no such function
        return


def measured(make: Callable[[], T], at_least: int = 0) -> tuple[T, int]:
    """What ``make`` returns, and the bytes by which it made the process grow for good.

    Pages that lay free count as well, since they are given back before. What other threads do meanwhile is counted too: a
    figure below ``at_least`` is none. It is ``at_least`` where the system does not tell.
    """
    give_back()
    before = resident_bytes()
    made = make()
    give_back()
    after = resident_bytes()
    return made, at_least if before is None or after is None else max(after - before, at_least)
