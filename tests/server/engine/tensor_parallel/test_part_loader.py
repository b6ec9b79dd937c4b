"""A rank reads its part of a base tensor by tensor; parts in NF4 have the values of the whole; what has none is refused
by name."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.base.families import UnsupportedBase
from adapters_store.base.tensors import NF4_MARK
from adapters_store.base.weights import load_causal
from server.engine.tensor_parallel.cuts import INPUTS, OUTPUTS
from server.engine.tensor_parallel.part_loader import Part, load_part
from server.engine.tensor_parallel.sharded_base import cuts_of
from support.models.models import save_base
from support.models.stored_nf4 import save_in_nf4

CPU = torch.device("cpu")
RANKS = 2
FAMILIES = ("llama", "phi3", "glm4", "starcoder2")
FORMS = [("gpt2", False), *((family, stored) for family in FAMILIES for stored in (False, True))]
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 16}
LARGE = {**SIZES, "num_key_value_heads": 4, "num_hidden_layers": 24, "intermediate_size": 1024}


def weight_of(linear: Any) -> torch.Tensor:
    """[out_features, in_features], as the layer multiplies by it."""
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "stored"),
    [
        *((family, stored) for family in ("llama", "phi3", "glm4", "starcoder2") for stored in (False, True)),
        ("gpt2", False),
    ],
)
def test_parts_in_nf4_have_the_values_of_the_whole_weight(
    family: str, stored: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family, dtype=dtype, **SIZES)
    if stored:
        base = save_in_nf4(base, tmp_path / "stored", dtype=dtype, compute_dtype=dtype)
    quantize, name = None if stored else "nf4", str(dtype).removeprefix("torch.")
    cuts = cuts_of(base, RANKS, dtype=name, quantize=quantize)
    whole = load_causal(base, dtype, CPU, nf4=not stored)
    parts = [load_part(base, Part(cuts, rank, CPU), dtype) for rank in range(RANKS)]
    assert {cut.dim for cut in cuts.by_name.values()} == {INPUTS, OUTPUTS}
    for path, cut in cuts.by_name.items():
        expected = whole.get_submodule(path)
        for rank, part in enumerate(parts):
            own = part.get_submodule(path)
            assert torch.equal(weight_of(own), cut.part(weight_of(expected), cut.dim, rank)), path
            if expected.bias is not None:
                bias = cut.part(expected.bias, 0, rank) if cut.dim == OUTPUTS else expected.bias
                assert torch.equal(own.bias, bias), path


@pytest.mark.parametrize("form", ["plain", "nf4", "stored"])
def test_a_rank_never_has_more_than_its_part_and_one_weight(form: str, tmp_path: Path) -> None:
    """Of memory that torch allocates. The files are mapped, and count as that in its profile."""
    base = save_base(tmp_path / "base", "llama", **LARGE)
    if form == "stored":
        base = save_in_nf4(base, tmp_path / "stored", dtype=torch.float32, compute_dtype=torch.float32)
    cuts = cuts_of(base, 4, dtype="float32", quantize="nf4" if form == "nf4" else None)
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()  # what earlier models hold would be counted where it is freed
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        model = load_part(base, Part(cuts, 1, CPU), torch.float32)
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    mapped = (base / "model.safetensors").stat().st_size
    kept = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    weight = 4 * 1024 * SIZES["hidden_size"]
    whole = sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    assert kept < whole / 3
    assert kept / 2 < most - mapped <= kept * 1.15 + 3 * weight  # absmaxes are not among the parameters


@pytest.mark.parametrize("form", ["nf4", "stored"])
def test_a_cut_through_blocks_is_refused_with_the_numbers(form: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", **{**SIZES, "intermediate_size": 320})
    if form == "stored":
        base = save_in_nf4(base, tmp_path / "stored", dtype=torch.float32, compute_dtype=torch.float32)
    wanted = (
        r"--tensor-parallel 2: .*: model\.layers\.0\.mlp\.down_proj: a rank has 160 of 320 inputs, which NF4's blocks "
        "of 64 do not divide"
    )
    with pytest.raises(UnsupportedBase, match=wanted):
        cuts_of(base, RANKS, quantize="nf4" if form == "nf4" else None)
    narrow = save_base(tmp_path / "narrow", "llama", hidden_size=96)
    with pytest.raises(UnsupportedBase, match=r"self_attn\.q_proj: a rank has 96 inputs, which NF4's blocks of 64"):
        cuts_of(narrow, RANKS, quantize="nf4")


def test_blocks_of_another_size_are_refused_by_name(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", **SIZES)
    stored = save_in_nf4(base, tmp_path / "stored", dtype=torch.float32, compute_dtype=torch.float32)
    tensors = load_file(stored / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.weight{NF4_MARK}"
    about = json.loads(bytes(tensors[name].tolist())) | {"blocksize": 128}
    tensors[name] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    cuts = cuts_of(stored, RANKS, dtype="float32")
    with pytest.raises(UnsupportedBase, match=r"layers\.1\.mlp\.up_proj\.weight is stored in NF4 blocks of 128"):
        load_part(stored, Part(cuts, 0, CPU), torch.float32)
