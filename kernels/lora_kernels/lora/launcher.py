"""Launchers of the linear layers: the base product of a group and its adapters' deltas. Chooses by device and size."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear

from lora_kernels.lora.batch import ExpertsBatch, LoraBatch, LoraGroup
from lora_kernels.lora.token_rows import matrix
from lora_kernels.native.bindings import NativeOps, native_ops
from lora_kernels.triton_common.available import on_triton


def group_linear(
    x_TH: torch.Tensor,
    weight_OH: torch.Tensor,
    bias_O: torch.Tensor | None,
    batch: LoraBatch | None,
    group: LoraGroup,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x W^T + bias + each row's own adapter's delta; with DoRA's factors, factor * (x W^T + delta) + bias.

    x_TH: [T, H] contiguous; weight_OH: [O, H], the members' weights, stacked, or repacked. batch None: base only.
    Returns [T, O] in `dtype`: x's (None), or float32, which is what the sums have before they are rounded.
    """
    dtype = dtype or x_TH.dtype
    native, is_repacked, num_rows = _native_for(x_TH), weight_OH.dim() == 1, x_TH.shape[0]  # len(x_TH) takes 0.7 us
    least = 1 if dtype is not x_TH.dtype or native is None else native.linear_min_rows  # the library's product rounds
    if native is None or not (is_repacked or least <= num_rows <= native.linear_max_rows):
        return add_lora_delta(_product(x_TH, weight_OH, bias_O, dtype), x_TH, batch, group, bias_O)
    width = sum(group.out_features)
    y_TO = x_TH.new_empty(num_rows, width, dtype=dtype)
    (native.repacked_linear if is_repacked else native.linear)(
        None if batch is None else batch.native_address,
        group.native_address,
        y_TO.data_ptr(),
        width,
        x_TH.data_ptr(),
        group.in_features,
        weight_OH.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        num_rows,
        width,
        dtype is torch.float32,
    )
    return y_TO


def _product(
    x_TH: torch.Tensor, weight_OH: torch.Tensor, bias_O: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    if dtype is x_TH.dtype:
        return linear(x_TH, weight_OH, bias_O)
    if x_TH.is_cuda:
        y_TO = torch.mm(x_TH, weight_OH.t(), out_dtype=dtype)
        return y_TO if bias_O is None else y_TO.add_(bias_O)
    return linear(x_TH, weight_OH, bias_O).to(dtype)  # the library's product on a CPU rounds


def own_head_rows(y_TV: torch.Tensor, x_TH: torch.Tensor, batch: LoraBatch, group: LoraGroup) -> None:
    """Write the logits of each adapter's own head over the base's, in place. group: the head's."""
    for rows_R, own in batch.token_segments:
        if own.is_head:
            weight_VH = matrix(batch.table.arena, own.a_offset, y_TV.shape[1], x_TH.shape[1])
            y_TV[rows_R] = group_linear(x_TH[rows_R], weight_VH, None, None, group, dtype=y_TV.dtype)


def has_expert_kernel(x_EH: torch.Tensor) -> bool:
    """Whether `expert_linear` takes such rows."""
    native = _native_for(x_EH)
    return native is not None and native.linear_max_rows > 0


def expert_linear(
    x_EH: torch.Tensor,
    weight_XOH: torch.Tensor,
    starts: NDArray[np.int64],
    batch: ExpertsBatch | None,
    group: LoraGroup,
) -> torch.Tensor:
    """Each row times its expert's weight, plus its own adapter's delta. A row has the same bits beside any others.

    x_EH: [E, H] contiguous, sorted by expert; expert X has the rows starts[X]..starts[X + 1]. weight_XOH: [X, O, H], or
    repacked. Returns [E, O]."""
    native, [out] = native_ops(x_EH.dtype), group.out_features
    assert native is not None, "asked has_expert_kernel first"
    assert x_EH.dtype == weight_XOH.dtype, "rows and experts share one dtype"
    y_EO = x_EH.new_empty(len(x_EH), out)
    native.experts(
        None if batch is None else batch.native_address,
        group.native_address,
        y_EO.data_ptr(),
        x_EH.data_ptr(),
        weight_XOH.data_ptr(),
        starts.ctypes.data,
        len(starts) - 1,
        out,
        weight_XOH.dim() == 1,
    )
    return y_EO


def add_lora_delta(
    y_TO: torch.Tensor,
    x_TH: torch.Tensor,
    batch: LoraBatch | None,
    group: LoraGroup,
    bias_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """y += scale * (x A^T) B for each row's own adapter, in place. y_TO: [T, sum(out_features)], x's dtype or float32.
    Returns y.

    bias_O: what y holds of it already; DoRA's factors multiply all but it."""
    if batch is None:
        return y_TO
    assert x_TH.dtype == batch.table.arena.dtype, "input and adapters share one dtype"
    assert y_TO.dtype in (x_TH.dtype, torch.float32), "an output has the input's dtype or float32"
    if on_triton(x_TH, "lora"):
        from lora_kernels.lora.triton_launch import add_lora_delta_triton

        return add_lora_delta_triton(y_TO, x_TH, batch, group, bias_O)
    native = _native_for(x_TH)
    if native is None:
        return _add_by_segment(y_TO, x_TH, batch, group, bias_O)
    native.lora_delta(
        batch.native_address,
        group.native_address,
        y_TO.data_ptr(),
        y_TO.stride(0),
        x_TH.data_ptr(),
        x_TH.stride(0),
        None if bias_O is None else bias_O.data_ptr(),
        y_TO.dtype is torch.float32,
    )
    return y_TO


def _native_for(x_TH: torch.Tensor) -> NativeOps | None:
    is_ours = x_TH.is_cpu and not on_triton(x_TH, "lora")
    return native_ops(x_TH.dtype) if is_ours else None


def _add_by_segment(
    y_TO: torch.Tensor, x_TH: torch.Tensor, batch: LoraBatch, group: LoraGroup, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """The fallback in plain torch: two small products per adapter and member, on views of the arena."""
    table = batch.table
    rows_R = torch.from_numpy(batch.rows).long().to(x_TH.device)
    for segment, cell in enumerate(batch.slots.tolist()):
        expert, slot = divmod(cell, table.num_slots)  # expert: 0 in a plain batch
        rows = rows_R[int(batch.starts[segment]) : int(batch.starts[segment + 1])]
        x_RH = x_TH[rows]
        for module, start, out in zip(group.module_rows, group.starts, group.out_features, strict=True):
            if int(table.ranks[module + expert, slot]) == 0:
                continue
            a_KH, b_KO = table.matrices(module + expert, slot, group.in_features, out)
            delta_RO = (x_RH.to(a_KH.dtype) @ a_KH.T) @ b_KO * table.scales[module + expert, slot].to(a_KH.dtype)
            part_TO = y_TO[:, start : start + out]
            part_TO.index_add_(0, rows, delta_RO.to(y_TO.dtype))
            factors_O = table.factors_of(module + expert, slot, out)
            if factors_O is not None:
                own = 0.0 if bias_O is None else bias_O[start : start + out].float()
                part_TO[rows] = (factors_O * (part_TO[rows].float() - own) + own).to(y_TO.dtype)
    return y_TO
