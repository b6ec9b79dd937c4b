"""bfloat16 products by AMX: in the order that Intel documents, and without AMX where the system refuses it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lora_kernels.lora.batch import LoraGroup
from lora_kernels.lora.launcher import group_linear
from lora_kernels.lora.repacked import is_repacked_here, repacked
from support.kernels.built_bits import built_bits

CPU = Path("/proc/cpuinfo")
pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc"),
    pytest.mark.skipif(not CPU.exists() or "amx_bf16" not in CPU.read_text(), reason="no AMX"),
]
WITHOUT = ("-mno-amx-tile", "-mno-amx-bf16")
REFUSED = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

room = ctypes.create_string_buffer(4096)  # for signals; too small to save tiles, so Linux allows none
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(room), 0, 4096)), None) == 0
"""


def in_amx_order(x_TH: torch.Tensor, weight_OH: torch.Tensor) -> torch.Tensor:
    """TDPBF16PS by Intel's manual: of 16 pairs the first elements' sum, the second elements' sum, then both to the
    total, each rounded to float32. Products of bfloat16 are exact in it."""
    padding = (0, -x_TH.shape[1] % 32)
    x, weight = (torch.nn.functional.pad(each.float(), padding) for each in (x_TH, weight_OH))
    total = torch.zeros(len(x), len(weight))
    for step in range(0, x.shape[1], 32):
        halves = [torch.zeros_like(total), torch.zeros_like(total)]
        for k in range(step, step + 32):
            halves[k % 2] += x[:, k, None] * weight[None, :, k]
        total += halves[0] + halves[1]
    return total


@pytest.mark.parametrize("num_rows", [1, 5, 16, 17, 32, 33, 40, 100])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(64, 64), (32, 16), (254, 48), (34, 112), (30, 144), (1058, 80)]
)
def test_sums_have_the_order_of_the_manual(num_rows: int, in_features: int, out_features: int) -> None:
    """Of weights as they lie and of repacked ones, whatever the numbers of rows and columns leave over."""
    generator = torch.Generator().manual_seed(num_rows)
    x_TH = torch.randn(num_rows, in_features, generator=generator).bfloat16()
    weight_OH = torch.randn(out_features, in_features, generator=generator).bfloat16()
    group = LoraGroup((0,), in_features, (out_features,))
    assert is_repacked_here(weight_OH)
    expected = in_amx_order(x_TH, weight_OH).bfloat16()
    for weight in (weight_OH, repacked(weight_OH)):
        assert torch.equal(group_linear(x_TH, weight, None, None, group), expected)


def test_a_system_that_refuses_the_tiles_has_the_bits_of_a_build_without_them(tmp_path: Path) -> None:
    """The library, whose products are among those bits, is refused them as well."""
    assert built_bits(tmp_path, before=REFUSED) == built_bits(tmp_path, *WITHOUT, before=REFUSED)
