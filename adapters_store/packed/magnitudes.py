"""DoRA's magnitudes as factors of a layer's outputs: m / ||W + scale B A||, which no request has to compute again.

The norm is of the weights that are served, and of A and B as they are packed. One layer's weight is in memory at a
time, and a part of it in float32. Source: Liu et al. 2024 (arXiv 2402.09353), and PEFT's `DoraLinearLayer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adapters_store.base.converted.shards import opened_weights
from adapters_store.base.description import BaseDescription
from adapters_store.base.families import HEAD, family_of
from adapters_store.base.files import load_config
from adapters_store.base.nf4 import dequantized, nf4_rounded
from adapters_store.base.token_weights import weights_are_there
from adapters_store.errors import AdapterRejected, AdapterUnavailable
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
    with _base_weights(base) as weights:
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


class _BaseWeights:
    """The base's linear weights as they are served, read from its files one layer at a time.

    lies_in: which open file holds each tensor.
    """

    def __init__(self, base: BaseDescription, lies_in: Mapping[str, Any]) -> None:
        self._base = base
        self._lies_in = lies_in
        self._family = family_of(base.architecture)

    def of(self, module: str) -> torch.Tensor:
        """[out_features, in_features], with the values that the server multiplies by: rounded to its type, and to NF4
        and back where it holds NF4. A head that is tied to the embedding is the embedding.

        Raises AdapterUnavailable (base_weights_missing) if the files hold no such weight.
        """
        shape = self._base.modules[module]
        name = self._name_of(module)
        weight: torch.Tensor = self._lies_in[name].get_tensor(name)
        if weight.dtype is torch.uint8:
            about = {key: file.get_tensor(key) for key, file in self._lies_in.items() if key.startswith(f"{name}.")}
            weight = dequantized(weight, about)
        elif self._family.has_transposed_weights and module != HEAD:
            weight = weight.T
        weight = weight.to(getattr(torch, self._base.dtype))
        if self._base.nf4 and module != HEAD:
            weight = nf4_rounded(weight.contiguous())
        assert weight.shape == (shape.out_features, shape.in_features), f"{name}: {list(weight.shape)}"
        return weight

    @property
    def _is_tied(self) -> bool:
        return bool(load_config(Path(str(self._base.folder))).tie_word_embeddings)

    def _name_of(self, module: str) -> str:
        """Files of some bases lack the name of the whole model ("h.0.attn.c_attn")."""
        if module == HEAD and f"{HEAD}.weight" not in self._lies_in and self._is_tied:
            module = self._family.embedding
        names = (f"{module}.weight", f"{module.partition('.')[2]}.weight")
        found = next((name for name in names if name in self._lies_in), None)
        if found is None:
            raise _missing(self._base, f"hold no weight of {module}")
        return found


@contextmanager
def _base_weights(base: BaseDescription) -> Iterator[_BaseWeights]:
    """Raises AdapterUnavailable (base_weights_missing) if the files are not those of the base. OSError."""
    if not weights_are_there(base):
        raise _missing(base, "are not there, or have changed since it was described")
    with opened_weights(Path(str(base.folder))) as lies_in:
        yield _BaseWeights(base, lies_in)


def _missing(base: BaseDescription, what: str) -> AdapterUnavailable:
    message = (
        f"use_dora: the norms of the base's weights are needed, and the files of {base.name} in {base.folder} {what}"
    )
    return AdapterUnavailable("base_weights_missing", message)
