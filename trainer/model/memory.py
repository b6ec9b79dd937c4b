"""How much memory the process has used, how much it may use, and whether an error means too little. Knows no model."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

from lora_kernels.cgroups import free_host_bytes

_STATUS = Path("/proc/self/status")
_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)


def peak_bytes(device: torch.device) -> int:
    """On a GPU: the most that torch has allocated. On a CPU: the process's peak resident size, code included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    own = _PEAK.search(_STATUS.read_text()) if _STATUS.exists() else None
    if own is not None:  # getrusage would count what a process had that started this one
        return int(own[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes(device: torch.device) -> int | None:
    """What this process may hold in all: what it holds now, and what is free beside it. None if unknown.

    On a GPU without CUDA's context; on a CPU within the process's own limits, too (ulimit -d, -v).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    bounds = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    free = free_host_bytes()
    if free is not None:
        bounds.append(free + _resident_bytes(device))
    return min(bounds, default=None)


def _resident_bytes(device: torch.device) -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_bytes(device)


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises a different error for each device; some are RuntimeErrors that only their text tells apart."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    texts = ("can't allocate memory", "not enough memory", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
