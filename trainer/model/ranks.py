"""The processes that train together: this one alone, or those that torchrun started. Knows sums; knows no model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Ranks:
    """This process among all. mesh: what parameters are sharded over; None if one process trains alone."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over all ranks, in float64, the same on each."""
        values = values.to(self.device, torch.float64)
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def agreed(self, text: str) -> str:
        """The first rank's text, on every rank."""
        if self.mesh is None:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.mesh is not None:
            dist.barrier()


def own_device() -> torch.device:
    """The device that this process trains on."""
    on_gpu = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")


@contextmanager
def joined(*, sharded: bool) -> Iterator[Ranks]:
    """The ranks of this run, while it lasts. sharded: a process group is needed, even of one."""
    device = own_device()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    if not sharded:
        yield Ranks(0, 1, device)
        return
    is_guest = dist.is_initialized()  # a group that is there already is used and left in place
    if not is_guest:
        _join("nccl" if on_gpu else "gloo")
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, mesh)
    finally:
        if not is_guest:
            dist.destroy_process_group()


def _join(backend: str) -> None:
    """The group that torchrun's environment describes; without one, a group of this process alone."""
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=torch._C._distributed_c10d.HashStore())
