"""What the processor or GPU computes in hardware."""

from __future__ import annotations

import contextlib
import ctypes
import gc

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt(3)."""


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware; emulated on an older CPU they are a hundred times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))


def keep_freed_memory() -> None:
    """Have this process keep what it frees: a training step asks for the same again, and new pages cost time.

    Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20)):
            mallopt(parameter, value)


def give_back_freed_memory() -> None:
    """The opposite, once: when something else comes next, whose tensors have other sizes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
