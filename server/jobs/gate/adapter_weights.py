"""An adapter's matrices, layer by layer, beside the size of the weights they change. Knows files; judges nothing."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from adapters_store.base.nf4 import dequantized
from adapters_store.format.validate import AdapterPlan
from adapters_store.parsing.adapter_files import WEIGHTS_FILE
from trainer.gate.spectrum import ModuleWeights


def module_weights(plan: AdapterPlan, adapter: Path, base: Path) -> list[ModuleWeights]:
    """Every targeted layer of the adapter in folder `adapter`, float32, with its base weight's Frobenius norm."""
    norms = weight_norms(base, [module.name for module in plan.modules])
    with safe_open(adapter / WEIGHTS_FILE, framework="pt") as file:
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
    """Frobenius norm of each layer's weight in the base's folder; a tied head has none and is absent."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(base.glob("*.safetensors"))]
        lies_in = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (no mapping)

        def norm(name: str) -> float:
            weight = lies_in[name].get_tensor(name)
            if weight.dtype is torch.uint8:
                about = {key: file.get_tensor(key) for key, file in lies_in.items() if key.startswith(f"{name}.")}
                weight = dequantized(weight, about)
            return float(torch.linalg.vector_norm(weight, dtype=torch.float32))

        return {module: norm(f"{module}.weight") for module in modules if f"{module}.weight" in lies_in}
