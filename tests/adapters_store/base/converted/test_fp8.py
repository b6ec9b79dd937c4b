"""Bases of 8-bit floats are served with the values that their files mean: transformers and PEFT are the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters_store.base import digests
from adapters_store.base.converted import door, shards
from adapters_store.base.converted.door import folder_of
from adapters_store.base.converted.fp8 import spread
from adapters_store.base.families import UnsupportedBase
from adapters_store.base.files import describe_base
from server.engine.model.base_model import load_base
from server.engine.tensor_parallel.leader import Leader
from server.engine.tensor_parallel.sharded_base import cuts_of
from support.models.models import peft_model, save_adapter
from support.models.packed_forward import PackedForward
from support.servers.service import make_base

Tensors = dict[str, torch.Tensor]
BLOCK = [32, 32]
HUB = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "block_structure": None}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": {"num_bits": 8}}},
}
PROMPT = [5, 9, 30, 41, 7, 77, 3, 120, 64]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(door, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(digests, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (size // step for size, step in zip(weight.shape, BLOCK, strict=True))
    scale = weight.view(rows, BLOCK[0], columns, BLOCK[1]).abs().amax((1, 3)) / 448
    return scale, scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)


def by_row(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    return scale, scale.float()


def save_fp8(
    plain: Path, config: dict[str, Any], name: str, scales: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> Tensors:
    """Rewrite the base in `plain` in 8-bit floats. Returns what its tensors mean, float32."""
    meant: Tensors = load_file(plain / "model.safetensors")
    stored: Tensors = {}
    for key, weight in meant.items():
        stored[key] = weight
        if key.endswith("_proj.weight"):
            scale, factors = scales(weight)
            stored[key] = (weight / factors).to(torch.float8_e4m3fn)
            stored[key.replace("weight", name)] = scale
            meant[key] = stored[key].float() * factors
    save_file(stored, plain / "model.safetensors", metadata={"format": "pt"})
    body = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**body, "quantization_config": config}))
    return meant


def logits(base: Path, adapter: Path) -> torch.Tensor:
    forward = PackedForward(load_base(base, dtype="float32"), [adapter], num_sequences=1)
    return forward.logits([forward.request(0, PROMPT, 0)])[0]


def test_the_hubs_form_has_transformers_weights_and_pefts_logits(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    meant = save_fp8(base, HUB, "weight_scale_inv", in_blocks)
    said: list[str] = []
    folder = folder_of(base, said.append)
    assert said == [f"{base}: FP8 weights, dequantised to bfloat16 in {folder}"]
    assert folder_of(base, said.append) == folder
    assert len(said) == 1
    ours = load_file(folder / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in ours.items()} == dict.fromkeys(meant, torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor.bfloat16()), name
    adapter = save_adapter(
        folder, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), seed=1
    )
    with torch.inference_mode():
        expected = peft_model(folder, adapter)(torch.tensor([PROMPT])).logits[0]
    assert (logits(folder, adapter) - expected).abs().max() <= 1e-4


def test_two_ranks_share_the_converted_folder(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    save_fp8(base, HUB, "weight_scale_inv", in_blocks)
    with pytest.raises(UnsupportedBase, match="stored as fp8; served are unquantised ones and bitsandbytes nf4"):
        cuts_of(base, 2)
    folder = folder_of(base)
    adapter = save_adapter(
        folder, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), seed=1
    )
    leader = Leader(2, torch.device("cpu"), timeout_s=600)
    try:
        shared = leader.load_base(folder, cuts_of(folder, 2, dtype="float32"), num_threads=1)
        forward = PackedForward(shared, [adapter], num_sequences=1, leader=leader)
        got, expected = forward.logits([forward.request(0, PROMPT, 0)])[0], logits(folder, adapter)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    finally:
        leader.close()


def test_compressed_tensors_form_in_several_files_has_the_values_it_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base")
    meant = save_fp8(base, COMPRESSED, "weight_scale", by_row)
    stored = load_file(base / "model.safetensors")
    stored["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    (base / "model.safetensors").unlink()
    owner = {name: f"model-0000{1 + name.endswith('_scale')}-of-00002.safetensors" for name in stored}
    for file in set(owner.values()):
        save_file({name: stored[name] for name in stored if owner[name] == file}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owner}))
    monkeypatch.setattr(shards, "SHARD_BYTES", 1 << 16)
    folder = folder_of(base)
    ours: Tensors = {}
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        ours |= load_file(file)
    assert ours.keys() == meant.keys()
    for name, tensor in meant.items():
        assert torch.equal(ours[name], tensor.bfloat16()), name
    assert describe_base(folder).dtype == "bfloat16"


def test_a_block_at_the_edge_is_a_part_of_one() -> None:
    scale = torch.arange(1.0, 7.0).view(2, 3)
    spread_out = spread(scale, torch.Size((5, 7)), [3, 3])
    assert spread_out is not None
    assert spread_out.shape == (5, 7)
    assert all(spread_out[row, column] == scale[row // 3, column // 3] for row in range(5) for column in range(7))
    assert spread(scale, torch.Size((5, 7)), None) is None
    assert spread(scale, torch.Size((7, 5)), [3, 3]) is None


def _in_int8(base: Path) -> None:
    config = base / "config.json"
    config.write_text(config.read_text().replace('"num_bits": 8, "type": "float"', '"num_bits": 4, "type": "int"'))


def _tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def edit(base: Path) -> None:
        stored = load_file(base / "model.safetensors")
        change(stored)
        save_file(stored, base / "model.safetensors")

    return edit


Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_in_int8, "no 8-bit floats (4 bits, int)"),
        (_tensors(lambda stored: stored.pop(f"{Q0}_scale")), f"{Q0} is stored as F8_E4M3 without a scale"),
        (_tensors(lambda stored: stored.update({f"{Q0}_scale": torch.ones(3, 1)})), "no scale for the whole, a row"),
        (_tensors(lambda stored: stored.update({Q0: stored[Q0].to(torch.float8_e5m2)})), "stored as float8_e5m2"),
        (_tensors(lambda stored: stored.update({f"{Q0}_zero_point": torch.ones(3)})), "are not of this architecture"),
    ],
)
def test_what_cannot_be_read_is_refused_and_leaves_nothing(
    edit: Callable[[Path], None], words: str, tmp_path: Path, cache: Path
) -> None:
    base = make_base(tmp_path / "base")
    save_fp8(base, COMPRESSED, "weight_scale", by_row)
    edit(base)
    with pytest.raises(UnsupportedBase) as refused:
        folder_of(base)
    assert words in refused.value.message
    assert str(base) in refused.value.message
    assert not [path for path in (cache / "bases").iterdir() if path.is_dir()]
