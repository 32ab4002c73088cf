"""What the processor or GPU computes in hardware."""

from __future__ import annotations

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware; emulated on an older CPU they are a hundred times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))
