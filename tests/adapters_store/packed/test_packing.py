"""The buffer's layout, and that every value in it is the file's value, cast as torch casts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters_store.base.description import BaseDescription
from adapters_store.format.config import parse_config
from adapters_store.format.dtypes import TENSOR_TYPES, cast_bits, largest_magnitude
from adapters_store.format.limits import AdapterLimits
from adapters_store.format.safetensors_header import read_header
from adapters_store.format.validate import AdapterPlan, plan_adapter
from adapters_store.packed.layout import ALIGN_BYTES, PackedAdapter
from adapters_store.packed.packing import pack, packed_bytes
from support.models.adapter_files import Tensors, config_bytes, lora_tensors, safetensors_bytes, tiny_base, write
from support.stopwatch import quiet_s

LIMITS = AdapterLimits()
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def plan_and_pack(
    base: BaseDescription, tensors: Tensors, path: Path, **config: object
) -> tuple[AdapterPlan, PackedAdapter]:
    write(path, safetensors_bytes(tensors))
    config = {"target_modules": "all-linear"} | config
    plan = plan_adapter(parse_config(config_bytes(**config), LIMITS), read_header(path, LIMITS), base, LIMITS)
    return plan, pack(plan, path)


def spans(packed: PackedAdapter, base: BaseDescription) -> list[tuple[int, int, str, str]]:
    """(begin, end, side, module) of every matrix, in the order they lie."""
    found = []
    for module in packed.modules:
        shape = base.modules[module.name]
        found.append((module.a_offset, module.a_offset + module.rank * shape.in_features, "A", module.name))
        found.append((module.b_offset, module.b_offset + module.rank * shape.out_features, "B", module.name))
    return sorted(found)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_matrices_are_aligned_apart_and_inside(dtype: str, rank: int, tmp_path: Path) -> None:
    base = tiny_base(dtype=dtype)
    plan, packed = plan_and_pack(base, lora_tensors(base, ends=ALL, rank=rank), tmp_path / "w", r=rank)
    lying = spans(packed, base)
    assert all(begin * packed.buffer.element_size() % ALIGN_BYTES == 0 for begin, *_ in lying)
    assert all(end <= begin for (_, end, *_), (begin, *_) in pairwise(lying))
    assert lying[-1][1] <= packed.buffer.numel()
    assert packed.buffer.dtype == TORCH[dtype]
    assert packed.num_bytes == packed_bytes(plan)
    assert [module.name for module in packed.modules] == list(base.modules)


def test_in_a_group_every_a_precedes_every_b_and_groups_do_not_mix(tmp_path: Path) -> None:
    base = tiny_base()
    _, packed = plan_and_pack(base, lora_tensors(base, ends=ALL), tmp_path / "w")
    order = [(side, name) for _, _, side, name in spans(packed, base)]
    expected = [(side, name) for group in base.groups for side in "AB" for name in group]
    assert order == expected


def test_an_untargeted_layer_takes_no_bytes(tmp_path: Path) -> None:
    base = tiny_base()
    _, packed = plan_and_pack(base, lora_tensors(base, ends=("k_proj",), rank=2), tmp_path / "w", r=2)
    assert packed.buffer.numel() == 2 * (2 * 32 + 2 * 16)


def test_a_base_without_groups_packs_each_layer_alone(tmp_path: Path) -> None:
    grouped = tiny_base()
    base = BaseDescription(grouped.digest, "x", "y", "float32", grouped.modules)
    _, packed = plan_and_pack(base, lora_tensors(base, ends=ALL), tmp_path / "w")
    order = [(side, name) for _, _, side, name in spans(packed, base)]
    assert order == [(side, name) for name in base.modules for side in "AB"]


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", TORCH)
def test_values_are_cast_as_torch_casts(stored: str, dtype: str, tmp_path: Path) -> None:
    base = tiny_base(dtype=dtype)
    source = {name: torch.from_numpy(array).to(TORCH[stored]) for name, array in lora_tensors(base).items()}
    as_numpy: Tensors = {
        name: tensor.view(torch.uint16).numpy() if stored == "bfloat16" else tensor.numpy()
        for name, tensor in source.items()
    }
    _, packed = plan_and_pack(base, as_numpy, tmp_path / "w")
    for module in packed.modules:
        for side, offset in (("A", module.a_offset), ("B", module.b_offset)):
            tensor = source[f"base_model.model.{module.name}.lora_{side}.weight"].to(TORCH[dtype])
            wanted = tensor if side == "A" else tensor.T
            assert torch.equal(packed.buffer[offset : offset + wanted.numel()].view_as(wanted), wanted)


@pytest.mark.parametrize("target", ["F16", "BF16"])
def test_every_kind_of_float32_rounds_as_torch_rounds(target: str) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    edges = np.array([0, 0x80000000, 1, 0x7F7F7FFF, 0x3F808000, 0x3F818000, 0x33000000, 0x33000001, 0x477FEFFF])
    bits = np.concatenate([bits, edges.astype(np.uint32)])
    bits = bits[np.isfinite(bits.view(np.float32))]
    with np.errstate(over="ignore"):
        ours = cast_bits(bits, TENSOR_TYPES["F32"], TENSOR_TYPES[target])
    theirs = torch.from_numpy(bits.view(np.float32)).to(TENSOR_TYPES[target].torch_dtype).view(torch.uint16).numpy()
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("source", "width"), [("F16", 16), ("BF16", 16)])
@pytest.mark.parametrize("target", ["F16", "BF16", "F32"])
def test_every_half_width_value_is_cast_as_torch_casts(source: str, width: int, target: str) -> None:
    bits = np.arange(1 << width, dtype=np.uint32).astype(np.uint16)
    kind = TENSOR_TYPES[source]
    bits = bits[(bits & 0x7FFF) < kind.infinity]
    with np.errstate(over="ignore"):
        ours = cast_bits(bits, kind, TENSOR_TYPES[target])
    theirs = torch.from_numpy(bits).view(kind.torch_dtype).to(TENSOR_TYPES[target].torch_dtype)
    signed = torch.int32 if target == "F32" else torch.int16
    np.testing.assert_array_equal(ours.view(signed_numpy(target)), theirs.view(signed).numpy())


def signed_numpy(target: str) -> type:
    return np.int32 if target == "F32" else np.int16


@pytest.mark.parametrize("position", [0, 65_535, 65_536, 199_999])
def test_one_nan_anywhere_is_seen(position: int) -> None:
    bits = np.zeros((4, 50_000), dtype=np.uint16)
    bits.reshape(-1)[position] = 0xFFC0
    assert largest_magnitude(bits) >= TENSOR_TYPES["BF16"].infinity


def test_a_seven_megabyte_adapter_packs_quickly(tmp_path: Path) -> None:
    """Aim 15 ms on a quiet core; the bound leaves room for a busy machine."""
    shapes = tiny_base().modules["model.layers.0.self_attn.q_proj"]
    layer = type(shapes)(1024, 1024)
    modules = {f"model.layers.{index}.self_attn.q_proj": layer for index in range(107)}
    base = BaseDescription("sha256:0", "x", "y", "bfloat16", modules)
    tensors: Tensors = {
        f"base_model.model.{name}.lora_{side}.weight": np.ones(shape, np.uint16)
        for name in modules
        for side, shape in (("A", (16, 1024)), ("B", (1024, 16)))
    }
    plan, _ = plan_and_pack(base, tensors, tmp_path / "w", r=16)
    assert quiet_s(lambda: pack(plan, tmp_path / "w"), tries=5) < 0.045
