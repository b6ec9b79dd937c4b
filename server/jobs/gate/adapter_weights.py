"""An adapter's matrices, layer by layer, beside the size of the weights they change. Knows files; judges nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from adapters_store.base.description import ExpertsShape
from adapters_store.base.nf4 import dequantized
from adapters_store.format.dtypes import Bits
from adapters_store.format.experts.plan import PlannedExperts
from adapters_store.format.experts.targets import LAYERS_OF
from adapters_store.format.safetensors_header import TensorEntry
from adapters_store.format.validate import AdapterPlan
from adapters_store.packed.experts import joined
from adapters_store.parsing.adapter_files import WEIGHTS_FILE
from trainer.gate.spectrum import ModuleWeights


def module_weights(plan: AdapterPlan, adapter: Path, base: Path) -> list[ModuleWeights]:
    """Every targeted layer of the adapter in folder `adapter`, and each expert's part of a parameter
    ("model.layers.0.mlp.experts.3.down_proj"), float32, with its base weight's Frobenius norm."""
    shapes = plan.base.experts
    norms = weight_norms(base, [module.name for module in plan.modules])
    norms |= expert_norms(base, {stack.name: shapes[stack.name].num_experts for stack in plan.experts})
    with safe_open(adapter / WEIGHTS_FILE, framework="pt") as file:
        linear = [
            ModuleWeights(
                name=module.name,
                a=file.get_tensor(module.a.name).float(),
                b=file.get_tensor(module.b.name).float(),
                scale=module.scale,
                base_norm=norms.get(module.name),
            )
            for module in plan.modules
        ]
        return linear + [
            ModuleWeights(name, a, b, stack.scale, norms.get(name))
            for stack in plan.experts
            for name, a, b in _experts_of(stack, shapes[stack.name], file)
        ]


def _experts_of(
    stack: PlannedExperts, shape: ExpertsShape, file: Any
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    def read(entry: TensorEntry) -> Bits:
        bits: Bits = file.get_tensor(entry.name).float().numpy().view(np.uint32)
        return bits

    a_XRI, b_XRO = (torch.from_numpy(bits.view(np.float32)) for bits in joined(stack, shape, read))
    for expert, (a_RI, b_RO) in enumerate(zip(a_XRI, b_XRO, strict=True)):
        yield _name_of(stack.name, expert), a_RI, b_RO.T


def _name_of(stack: str, expert: int) -> str:
    container, _, parameter = stack.rpartition(".")
    return f"{container}.{expert}.{parameter}"


def weight_norms(base: Path, modules: Iterable[str]) -> dict[str, float]:
    """Frobenius norm of each layer's weight in the base's folder; a tied head has none and is absent."""
    with ExitStack() as stack:
        lies_in = _tensors_in(base, stack)
        names = {module: f"{module}.weight" for module in modules}
        return {module: _norm(lies_in, name) for module, name in names.items() if name in lies_in}


def expert_norms(base: Path, num_experts: dict[str, int]) -> dict[str, float]:
    """Of each expert's part of the parameters, by the names of `module_weights`. A base's files hold the experts of a
    layer as one parameter, or layers of each, as before transformers 5; what they do not hold is absent."""
    norms = {}
    with ExitStack() as stack:
        lies_in = _tensors_in(base, stack)
        for parameter, count in num_experts.items():
            for expert in range(count):
                container, _, name = parameter.rpartition(".")
                layers = [f"{container}.{expert}.{layer}.weight" for layer in LAYERS_OF[name]]
                if parameter in lies_in:
                    weight = lies_in[parameter].get_slice(parameter)[expert]
                    norms[_name_of(parameter, expert)] = _norm_of(weight)
                elif all(layer in lies_in for layer in layers):
                    norms[_name_of(parameter, expert)] = math.hypot(*(_norm(lies_in, layer) for layer in layers))
    return norms


def _tensors_in(base: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file of each tensor."""
    files = [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(base.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118  (no mapping)


def _norm(lies_in: dict[str, Any], name: str) -> float:
    weight = lies_in[name].get_tensor(name)
    if weight.dtype is torch.uint8:
        about = {key: file.get_tensor(key) for key, file in lies_in.items() if key.startswith(f"{name}.")}
        weight = dequantized(weight, about)
    return _norm_of(weight)


def _norm_of(weight: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32))
