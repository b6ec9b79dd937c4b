"""Five ways to add each row's own adapter to a group's output.

Each is built once per case, with its data laid out as it likes best, and then called per layer. Building is not
measured, which favours the others: ours reads the arena as the server keeps it.

Legend: T rows, N requests of L = T/N rows each, H in_features, O out_features, S active adapters, K their ranks' sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.common.arena import LayeredAdapters
from lora_kernels.lora.batch import LoraBatch, LoraGroup
from lora_kernels.lora.launcher import _add_by_segment, add_lora_delta

AddDelta = Callable[[torch.Tensor, torch.Tensor, int], None]  # y [T, O] += delta of x [T, H], on this layer


class LoraCase:
    """N requests with an adapter each (`slots[i]`), on the first group of each layer of `adapters`."""

    def __init__(self, adapters: LayeredAdapters, slots: Sequence[int], rows_per_request: int) -> None:
        self.adapters = adapters
        self.groups = [layer[0] for layer in adapters.groups]
        self.slots = list(slots)
        self.rows_per_request = rows_per_request
        self.row_slots = np.repeat(np.array(slots, dtype=np.int32), rows_per_request)
        self.batch = LoraBatch(adapters.table, self.row_slots)

    @property
    def num_rows(self) -> int:
        return len(self.row_slots)

    @property
    def scales(self) -> torch.Tensor:
        """[S], every module of an adapter has the same."""
        return self.adapters.table.scales[0]

    def members(self, layer: int) -> list[tuple[int, slice]]:
        """(member, its columns of the output) of the layer's group."""
        group = self.groups[layer]
        return [
            (member, slice(start, start + out))
            for member, (start, out) in enumerate(zip(group.starts, group.out_features, strict=True))
        ]


def native(case: LoraCase) -> AddDelta:
    """Ours: the kernel through its launcher."""

    def add(y_TO: torch.Tensor, x_TH: torch.Tensor, layer: int) -> None:
        add_lora_delta(y_TO, x_TH, case.batch, case.groups[layer])

    return add


def torch_fallback(case: LoraCase) -> AddDelta:
    """Ours without a C compiler."""

    def add(y_TO: torch.Tensor, x_TH: torch.Tensor, layer: int) -> None:
        _add_by_segment(y_TO, x_TH, case.batch, case.groups[layer])

    return add


def stacked(case: LoraCase) -> AddDelta:
    """Active A's and B's stacked, one dense product each, other adapters' columns masked out between them."""
    adapters, active = case.adapters, range(len(case.adapters.ranks))
    owner_K = torch.tensor([slot for slot in active for _ in range(adapters.ranks[slot])])
    mask_TK = (torch.from_numpy(case.row_slots)[:, None] == owner_K) * case.scales[owner_K]
    num_members, width = len(case.members(0)), len(owner_K)
    mask = mask_TK.to(adapters.table.arena.dtype).repeat(1, num_members)
    a_layers = [_each(case, group, adapters.a_of, torch.cat) for group in case.groups]
    a_all = [torch.cat(members) for members in a_layers]
    b_all = [_each(case, group, adapters.b_of, torch.cat) for group in case.groups]

    def add(y_TO: torch.Tensor, x_TH: torch.Tensor, layer: int) -> None:
        h = (x_TH @ a_all[layer].T).mul_(mask)
        for member, columns in case.members(layer):
            y_TO[:, columns].addmm_(h[:, member * width : (member + 1) * width], b_all[layer][member])

    return add


def gather_bmm(case: LoraCase) -> AddDelta:
    """Each request's A and B gathered, padded to the largest rank, and multiplied by `bmm`."""
    adapters = case.adapters
    index_N = torch.tensor(case.slots, device=adapters.table.arena.device)
    scale_N11 = case.scales[index_N, None, None].to(adapters.table.arena.dtype)
    a_all = [_each(case, group, adapters.a_of, _padded) for group in case.groups]
    b_all = [_each(case, group, adapters.b_of, _padded) for group in case.groups]

    def add(y_TO: torch.Tensor, x_TH: torch.Tensor, layer: int) -> None:
        x_NLH = x_TH.view(len(index_N), case.rows_per_request, -1)
        y_NLO = y_TO.view(len(index_N), case.rows_per_request, -1)
        for member, columns in case.members(layer):
            h_NLR = torch.bmm(x_NLH, a_all[layer][member][index_N].transpose(1, 2))
            y_NLO[:, :, columns] += torch.bmm(h_NLR, b_all[layer][member][index_N]) * scale_N11

    return add


def loop(case: LoraCase) -> AddDelta:
    """One adapter after the other, one module after the other, as PEFT's `adapter_names` does."""
    adapters = case.adapters
    active = sorted(set(case.slots))
    device = adapters.table.arena.device
    rows = {slot: torch.from_numpy(np.flatnonzero(case.row_slots == slot)).to(device) for slot in active}

    scales = case.scales.tolist()
    matrices = [  # where they lie is read from the device's table, which cannot be recorded
        [
            {slot: (adapters.a_of(group, member, slot), adapters.b_of(group, member, slot)) for slot in active}
            for member in range(len(group.out_features))
        ]
        for group in case.groups
    ]

    def add(y_TO: torch.Tensor, x_TH: torch.Tensor, layer: int) -> None:
        for member, columns in case.members(layer):
            y_member = y_TO[:, columns]
            for slot in active:
                a_KH, b_KO = matrices[layer][member][slot]
                y_member[rows[slot]] += (x_TH[rows[slot]] @ a_KH.T) @ b_KO * scales[slot]

    return add


IMPLEMENTATIONS: dict[str, Callable[[LoraCase], AddDelta]] = {
    "native": native,
    "torch_fallback": torch_fallback,
    "stacked": stacked,
    "gather_bmm": gather_bmm,
    "loop": loop,
}


def _each(
    case: LoraCase,
    group: LoraGroup,
    matrix_of: Callable[[LoraGroup, int, int], torch.Tensor],
    join: Callable[[list[torch.Tensor]], torch.Tensor],
) -> list[torch.Tensor]:
    """Each member's matrices of all active adapters, joined."""
    active = range(len(case.adapters.ranks))
    return [join([matrix_of(group, member, slot) for slot in active]) for member in range(len(group.out_features))]


def _padded(matrices: list[torch.Tensor]) -> torch.Tensor:
    """[S, largest rank, columns], zeros below the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(matrices, batch_first=True)
