"""DoRA's magnitudes as factors of a layer's outputs: m / ||W + scale B A||, which no request has to compute again.

The norm is of the weights that are served, and of A and B as they are packed. One layer's weight is in memory at a
time, and a part of it in float32. Source: Liu et al. 2024 (arXiv 2402.09353), and PEFT's `DoraLinearLayer`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from adapters_store.base.description import BaseDescription
from adapters_store.errors import AdapterRejected
from adapters_store.packed.base_weights import base_weights
from adapters_store.packed.layout import PackedModule
from lora_kernels.lora.batch import matrices_at

_PART_ELEMENTS = 1 << 22  # of a weight, in float32 at once: 16 MiB


@torch.inference_mode()
def divide_by_norms(
    buffer: torch.Tensor, modules: Iterable[PackedModule], base: BaseDescription, *, is_int8: bool
) -> None:
    """Turn the magnitudes in the packed buffer into factors, in place. modules: those that have magnitudes. is_int8: of
    the buffer's A and B.

    Raises AdapterRejected (non_finite): a row of a layer's weights is zero. AdapterUnavailable (base_weights_missing).
    """
    with base_weights(base) as weights:
        for module in modules:
            factors_O = factors_in(buffer, module, base)
            shape, place = base.modules[module.name], (0, module.a_offset, module.b_offset, module.rank, module.scale)
            a_RH, b_RO = matrices_at(buffer, place, shape.in_features, shape.out_features, is_int8=is_int8)
            norms_O = _norms(weights.of(module.name), a_RH.float(), b_RO.T.float(), module.scale)
            factors_O /= norms_O
            if not bool(factors_O.isfinite().all()):
                row = int((~factors_O.isfinite()).nonzero()[0])
                message = (
                    f"{module.name}: magnitude of output {row} divided by the norm {norms_O[row]:.3g} is not finite"
                )
                raise AdapterRejected("non_finite", message, param="weights")


def factors_in(buffer: torch.Tensor, module: PackedModule, base: BaseDescription) -> torch.Tensor:
    """The module's factors: float32 [out_features], whatever the buffer's type. A view."""
    count = base.modules[module.name].out_features * (4 // buffer.element_size())
    return buffer[module.factor_offset : module.factor_offset + count].view(torch.float32)


def _norms(weight_OH: torch.Tensor, a_RH: torch.Tensor, b_OR: torch.Tensor, scale: float) -> torch.Tensor:
    rows = max(1, _PART_ELEMENTS // weight_OH.shape[1])
    parts = zip(weight_OH.split(rows), b_OR.split(rows), strict=True)
    return torch.cat([torch.addmm(w.float(), b, a_RH, alpha=scale).norm(dim=1) for w, b in parts])
