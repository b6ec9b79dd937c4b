"""This process among those that share one base: its number, its device, and the sum over all of them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore


class Ranks:
    """One of `size` ranks. Until `open` each computes alone: a step that only measures memory needs no others."""

    def __init__(self, rank: int, size: int, device: torch.device, rendezvous: Path, timeout_s: float) -> None:
        """Waits until all ranks are here. rendezvous: a file that they share. timeout_s: the longest that a sum may
        wait for a rank."""
        self.rank = rank
        self.size = size
        self.device = device
        self.num_sums = 0
        self._is_open = False
        self._group = _group(rendezvous, rank, size, device, timeout_s)

    def open(self) -> None:
        """From now on all ranks run each step."""
        self._is_open = True

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, in place, the same bits on each. Raises RuntimeError if a rank is gone, or
        does not come in time."""
        if self._is_open:
            self.num_sums += 1
            self._group.allreduce([tensor]).wait()
        return tensor


def _group(rendezvous: Path, rank: int, size: int, device: torch.device, timeout_s: float) -> Any:
    """NCCL among GPUs; among CPUs gloo over the loopback address, which no other machine reaches."""
    kind: Any = dist.ProcessGroupNCCL if device.type == "cuda" else dist.ProcessGroupGloo
    options = kind.Options() if device.type == "cuda" else kind._Options()
    options._timeout = timedelta(seconds=timeout_s)
    if device.type != "cuda":
        options._devices = [kind.create_device(hostname="127.0.0.1")]
    return kind(FileStore(str(rendezvous), size), rank, size, options)
