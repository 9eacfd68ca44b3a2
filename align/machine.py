"""What this machine's processors can do, and the memory that a process took of it."""

import resource
import sys

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16, rather than a slow detour."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def peak_bytes() -> int:
    """Return the most memory that this process had at a time: of the GPU, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
