"""Files that hold the base's own embedding or head beside an adapter, and files that hold nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.base.files import describe_base
from adapters_store.errors import AdapterRejected
from adapters_store.format.adapter_folder import plan_files
from adapters_store.format.limits import AdapterLimits
from support.models.adapter_files import PREFIX, config_bytes
from support.models.models import save_base


def test_a_file_of_the_bases_own_weights_alone_is_no_adapter(tmp_path: Path) -> None:
    """It was published with no bytes for the device, and the engine stopped where it asked for them."""
    base = describe_base(save_base(tmp_path / "base", "llama"))
    own = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    weights = tmp_path / "adapter_model.safetensors"
    query = "model.layers.0.self_attn.q_proj"
    shape = base.modules[query]
    lora = {
        f"{PREFIX}{query}.lora_A.weight": torch.ones(4, shape.in_features),
        f"{PREFIX}{query}.lora_B.weight": torch.ones(shape.out_features, 4),
    }
    config = config_bytes(target_modules="all-linear")
    save_file({f"{PREFIX}model.embed_tokens.weight": own, **lora}, weights)
    assert [module.name for module in plan_files(config, weights, base, AdapterLimits()).modules] == [query]
    save_file({f"{PREFIX}model.embed_tokens.weight": own}, weights)
    with pytest.raises(AdapterRejected, match="nothing but copies") as refused:
        plan_files(config, weights, base, AdapterLimits())
    assert refused.value.code == "no_tensors"
