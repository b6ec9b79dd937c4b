"""What another project's op is given: the inputs of ours, and adapters laid out as padded stacks. Knows no project."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.common.arena import LayeredAdapters
from benchmarks.common.shapes import GroupShape
from benchmarks.gpu.bench import Call

MakeCalls = Callable[["Job"], list[Call]]


@dataclass(frozen=True, eq=False)
class Job:
    """Rows `slots [T]` on adapters of one group, on several layers.

    adapters: ranks and matrices; all have the same scale. inputs: x [T, H] of each layer; outputs: y [T, sum(O)], to be
    added to in place.
    """

    shape: GroupShape
    slots: Sequence[int]
    adapters: LayeredAdapters
    inputs: Sequence[torch.Tensor]
    outputs: Sequence[torch.Tensor]
    scale: float

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.adapters.ranks

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def a(self, layer: int, member: int, slot: int) -> torch.Tensor:
        """[rank, H]"""
        return self.adapters.a_of(self.adapters.groups[layer][0], member, slot)

    def b(self, layer: int, member: int, slot: int) -> torch.Tensor:
        """[O, rank], as these projects keep it."""
        return self.adapters.b_of(self.adapters.groups[layer][0], member, slot).T

    def stack(self, parts: Sequence[torch.Tensor], rows: int, columns: int) -> torch.Tensor:
        """[len(parts), rows, columns]: each part in the first corner of its own, zeros around it."""
        stacked = self.inputs[0].new_zeros(len(parts), rows, columns)
        for one, part in zip(stacked, parts, strict=True):
            one[: part.shape[0], : part.shape[1]] = part
        return stacked
