"""An adapter's matrices, layer by layer, beside the size of the weights they change. Knows files; judges nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from adapters_store.validate import AdapterPlan
from trainer.gate.spectrum import ModuleWeights


def module_weights(plan: AdapterPlan, adapter: Path, base: Path) -> list[ModuleWeights]:
    """Every targeted layer of the adapter in folder `adapter`, float32, with its base weight's Frobenius norm."""
    norms = weight_norms(base, [module.name for module in plan.modules])
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        return [
            ModuleWeights(
                name=module.name,
                a=file.get_tensor(module.a.name).float(),
                b=file.get_tensor(module.b.name).float(),
                scale=module.scale,
                base_norm=norms.get(module.name),
            )
            for module in plan.modules
        ]


def weight_norms(base: Path, modules: list[str]) -> dict[str, float]:
    """Frobenius norm of each layer's weight in the base's folder; a tied head, which lies nowhere, is absent."""
    wanted = {f"{module}.weight": module for module in modules}
    norms: dict[str, float] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in wanted.keys() & set(file.keys()):
                norms[wanted[name]] = float(torch.linalg.vector_norm(file.get_tensor(name), dtype=torch.float32))
    return norms
