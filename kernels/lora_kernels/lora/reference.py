"""Plain torch, in float32, written to be read: the specification that every implementation is tested against."""

from __future__ import annotations

import torch

from lora_kernels.lora.batch import LoraBatch, LoraGroup


def lora_delta_reference(x_TH: torch.Tensor, batch: LoraBatch, group: LoraGroup) -> torch.Tensor:
    """scale * (x A^T) B for each row's own adapter, zero for rows without one.

    x_TH: [T, H]. Returns float32 [T, sum(out_features)]. Source: Punica (arXiv 2310.18547), S-LoRA (arXiv 2311.03285).
    """
    table = batch.table
    y_TO = torch.zeros(len(x_TH), sum(group.out_features), dtype=torch.float32, device=x_TH.device)
    for segment, cell in enumerate(batch.slots.tolist()):
        expert, slot = divmod(cell, table.num_slots)  # expert: 0 in a plain batch
        rows = torch.from_numpy(batch.rows[batch.starts[segment] : batch.starts[segment + 1]]).long().to(x_TH.device)
        for module, start, out in zip(group.module_rows, group.starts, group.out_features, strict=True):
            a_KH, b_KO = table.matrices(module + expert, slot, group.in_features, out)
            delta_RO = x_TH[rows].float() @ a_KH.float().T @ b_KO.float() * table.scales[module + expert, slot]
            y_TO[rows, start : start + out] = delta_RO
    return y_TO


def dora_reference(
    y_TO: torch.Tensor, x_TH: torch.Tensor, batch: LoraBatch, group: LoraGroup, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """y with each row's delta, and with its adapter's factors if it has any: factor * (y - bias + delta) + bias.

    y_TO: the base's product with its bias. Returns float32. Source: DoRA (arXiv 2402.09353), the factor being
    m / ||W + scale B A||.
    """
    total_TO = y_TO.float() + lora_delta_reference(x_TH, batch, group)
    own_O = torch.zeros(total_TO.shape[1], device=y_TO.device) if bias_O is None else bias_O.float()
    for segment, slot in enumerate(batch.slots.tolist()):
        rows = torch.from_numpy(batch.rows[batch.starts[segment] : batch.starts[segment + 1]]).long().to(y_TO.device)
        for module, start, out in zip(group.module_rows, group.starts, group.out_features, strict=True):
            factors_O, own = batch.table.factors_of(module, slot, out), own_O[start : start + out]
            if factors_O is not None:
                total_TO[rows, start : start + out] = factors_O * (total_TO[rows, start : start + out] - own) + own
    return total_TO
