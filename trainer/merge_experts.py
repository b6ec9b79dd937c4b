"""A base's stored weights of experts, and what an adapter adds to each. Knows names and matrices; writes nothing.

A folder holds the layers of each expert (mlp.experts.3.up_proj.weight), as hubs do, or one parameter for all experts of
a layer (mlp.experts.gate_up_proj, [experts, out, in]), as models of transformers 5 have it.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from adapters_store.base.description import ExpertsShape
from adapters_store.format.experts.plan import PlannedExperts
from adapters_store.format.experts.targets import LAYERS_OF
from adapters_store.format.safetensors_header import TensorEntry
from adapters_store.format.validate import AdapterPlan
from adapters_store.packed.experts import joined


@dataclass(frozen=True, slots=True)
class ExpertWeight:
    """expert: None: the stored weight is of all. outputs: those of the parameter's that it has, of gate and up one."""

    name: str
    stack: PlannedExperts
    shape: ExpertsShape
    expert: int | None
    outputs: slice


def expert_weights(plan: AdapterPlan, stored: Set[str]) -> list[ExpertWeight]:
    """Of the parameters that the adapter changes. stored: names of the base's tensors."""
    found = []
    for stack in plan.experts:
        shape, (container, _, name) = plan.base.experts[stack.name], stack.name.rpartition(".")
        if stack.name in stored:
            found.append(ExpertWeight(stack.name, stack, shape, None, slice(None)))
            continue
        width = shape.out_features // len(LAYERS_OF[name])
        found += [
            ExpertWeight(
                f"{container}.{expert}.{layer}.weight", stack, shape, expert, slice(index * width, (index + 1) * width)
            )
            for expert in range(shape.num_experts)
            for index, layer in enumerate(LAYERS_OF[name])
        ]
    return found


class ExpertSums:
    """W + scale * B A of stored weights of experts. read: a tensor of the adapter, [rows, columns]."""

    def __init__(self, read: Callable[[TensorEntry], Tensor]) -> None:
        self._read = read
        self._matrices = lru_cache(maxsize=4)(self._joined)  # a file alternates between a layer's parameters

    def __call__(self, weight: Tensor, part: ExpertWeight) -> Tensor:
        """In float32, rounded once to W's own type."""
        a_XRI, b_XRO = self._matrices(part.stack, part.shape)
        if part.expert is not None:
            return _sum(weight, a_XRI[part.expert], b_XRO[part.expert, :, part.outputs], part.stack.scale)
        return torch.stack(
            [_sum(own, a_RI, b_RO, part.stack.scale) for own, a_RI, b_RO in zip(weight, a_XRI, b_XRO, strict=True)]
        )

    def _joined(self, stack: PlannedExperts, shape: ExpertsShape) -> tuple[Tensor, Tensor]:
        """A [experts, rank, in] and B [experts, rank, out]."""
        a_XRI, b_XRO = joined(stack, shape, lambda entry: self._read(entry).float().numpy())
        return torch.from_numpy(a_XRI), torch.from_numpy(b_XRO)


def _sum(weight: Tensor, a_RI: Tensor, b_RO: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight.float(), b_RO.T, a_RI, alpha=scale).to(weight.dtype)
