"""The C kernels' NF4 layer equals a product with the weight that bitsandbytes dequantises, one-hot rows bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from lora_kernels.lora.batch import LoraGroup
from lora_kernels.native.bindings import native_ops
from lora_kernels.nf4 import launcher as nf4
from lora_kernels.nf4.launcher import nf4_linear, on_nf4_kernel
from server.engine.model import lora_layers
from server.engine.model.lora_layers import LinearGroup, LoraState
from support.kernels.triton_cases import normal, relative_error, tolerance
from support.models.nf4 import packed, quantized

DTYPES = (torch.float32, torch.bfloat16)
pytestmark = pytest.mark.skipif(native_ops(torch.float32) is None, reason="no C compiler")


def dequantized(layer: Linear4bit) -> torch.Tensor:
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
def test_it_multiplies_by_exactly_the_weight_that_bitsandbytes_dequantises(dtype: torch.dtype, nested: bool) -> None:
    layer = quantized(301, 640, dtype=dtype, nested=nested)
    columns = nf4_linear(torch.eye(640, dtype=dtype), [packed(layer)], [None])
    assert torch.equal(columns.T, dequantized(layer))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 3, 6, 7, 12, 33, 64, 130])
@pytest.mark.parametrize(("out", "inputs"), [(1, 64), (63, 192), (130, 1088)])
def test_any_rows_and_odd_sizes(dtype: torch.dtype, rows: int, out: int, inputs: int) -> None:
    layer = quantized(out, inputs, dtype=dtype, bias=True)
    x = normal(rows, inputs, dtype=dtype)
    exact = x.float() @ dequantized(layer).float().T + layer.bias.float()
    got = nf4_linear(x, [packed(layer)], [layer.bias])
    assert got.shape == (rows, out)
    assert rows == 0 or relative_error(got, exact) <= tolerance(inputs, dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_layers_that_read_the_same_input_lie_side_by_side(threads: int) -> None:
    layers = [quantized(out, 128, bias=out != 33, nested=out != 5) for out in (64, 33, 5)]
    biases = [layer.bias for layer in layers]
    wide = normal(9, 300, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    got = nf4_linear(wide[:, 100:228], [packed(layer) for layer in layers], biases)
    torch.set_num_threads(before)
    apart = [nf4_linear(wide[:, 100:228], [packed(layer)], [layer.bias]) for layer in layers]
    assert torch.equal(got, torch.cat(apart, dim=1))


def test_which_rows_and_dtypes_it_takes() -> None:
    for dtype in DTYPES:
        native = native_ops(dtype)
        assert native is not None
        assert native.nf4_max_rows >= 8
        few = min(native.nf4_max_rows, 1024)  # where no number of rows is too many, its limit is no size of a tensor
        assert on_nf4_kernel(torch.zeros(few, 64, dtype=dtype))
        assert on_nf4_kernel(torch.zeros(few + 1, 64, dtype=dtype)) == (few < native.nf4_max_rows)
    assert not on_nf4_kernel(torch.zeros(1, 64, dtype=torch.float16))


def test_the_engine_uses_it_and_leaves_the_rest_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = [quantized(out, 128, bias=True) for out in (64, 33, 32)]
    group = LinearGroup(linears, LoraGroup((0, 1, 2), 128, (64, 33, 32)), LoraState(), is_head=False)
    few, many = normal(5, 128, dtype=torch.bfloat16), normal(65, 128, dtype=torch.bfloat16)
    native = native_ops(torch.bfloat16)
    assert native is not None
    expected = [len(x) for x in (few, many) if len(x) <= native.nf4_max_rows]
    taken: list[int] = []
    monkeypatch.setattr(lora_layers, "nf4_linear", lambda x, *rest: taken.append(len(x)) or nf4_linear(x, *rest))
    ours = [group(few), group(many)]
    monkeypatch.setattr(nf4, "native_ops", lambda _: None)
    theirs = [group(few), group(many)]
    assert taken == expected
    assert 5 in taken
    assert torch.equal(ours[1], theirs[1])
    assert relative_error(ours[0], theirs[0]) <= tolerance(128, torch.bfloat16)
