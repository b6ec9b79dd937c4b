"""The NF4 matmul equals a product with the weight that bitsandbytes dequantises, in every layout it packs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from lora_kernels.lora.batch import LoraGroup
from lora_kernels.nf4 import triton_nf4 as nf4
from lora_kernels.nf4.launcher import NF4_MAX_ROWS, nf4_linear
from lora_kernels.nf4.reference import nf4_dequantize_reference
from lora_kernels.nf4.weight import Nf4Weight, nf4_weights
from lora_kernels.triton_common.available import triton_switch
from server.engine.model import lora_layers
from server.engine.model.lora_layers import LinearGroup, LoraState
from support.kernels.triton_cases import ALL_FORMS, normal, relative_error, tolerance
from support.models.nf4 import packed, quantized

SHAPES = [  # the short form: every number of rows, every size with few and with many
    (rows, out, inputs)
    for rows, (out, inputs) in itertools.product([1, 3, 16, 17, 33, 64], [(1, 64), (63, 192), (130, 1088)])
    if ALL_FORMS or out == 63 or rows in {1: (1, 64), 130: (3, 33)}[out]
]


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    triton_switch().on_cpu = True
    yield
    triton_switch().on_cpu = False


@pytest.mark.parametrize("nested", [True, False])
def test_reference_reads_the_packed_weight_as_bitsandbytes_does(nested: bool) -> None:
    layer = quantized(300, 192, nested=nested)
    expected = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(nf4_dequantize_reference(packed(layer)).bfloat16(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [True, False])
def test_kernel_multiplies_by_exactly_the_weight_that_bitsandbytes_dequantises(
    dtype: torch.dtype, nested: bool
) -> None:
    layer = quantized(70, 128, dtype=dtype, nested=nested)
    one_hot = torch.eye(128, dtype=dtype)
    columns = [nf4_linear(one_hot[i : i + 64], [packed(layer)], [None]) for i in (0, 64)]
    assert torch.equal(torch.cat(columns).T, dequantize_4bit(layer.weight.data, layer.weight.quant_state))


@pytest.mark.parametrize(("rows", "out", "inputs"), SHAPES)
def test_any_rows_and_odd_sizes(rows: int, out: int, inputs: int) -> None:
    layer = quantized(out, inputs, bias=True)
    x = normal(rows, inputs, dtype=torch.bfloat16)
    exact = x.float() @ dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().T + layer.bias.float()
    assert relative_error(nf4_linear(x, [packed(layer)], [layer.bias]), exact) <= tolerance(inputs, torch.bfloat16)


def test_rows_beyond_one_launch_are_those_of_launches_of_their_own() -> None:
    """So decode steps of more than 64 rows are recorded too."""
    layers = [quantized(out, 128, bias=True) for out in (40, 17)]
    weights, biases = [packed(layer) for layer in layers], [layer.bias for layer in layers]
    x = normal(131, 128, dtype=torch.bfloat16)
    apart = [nf4_linear(x[first : first + 64], weights, biases) for first in (0, 64, 128)]
    assert torch.equal(nf4_linear(x, weights, biases), torch.cat(apart))


def test_long_inputs_are_split_and_summed_in_a_fixed_order() -> None:
    layer = quantized(40, 4160)
    assert nf4.num_splits(40, 4160, 64, 512) == 16
    x = normal(2, 4160, dtype=torch.bfloat16)
    exact = x.float() @ dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().T
    got = nf4_linear(x, [packed(layer)], [None])
    assert relative_error(got, exact) <= tolerance(4160, torch.bfloat16)
    assert torch.equal(got, nf4_linear(x, [packed(layer)], [None]))


def test_a_group_of_the_engine_uses_the_kernel_up_to_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = [quantized(out, 128, bias=True) for out in (64, 33, 32)]
    group = LinearGroup(linears, LoraGroup((0, 1, 2), 128, (64, 33, 32)), LoraState(), is_head=False)
    seen: list[int] = []

    def counted(x: torch.Tensor, weights: list[Nf4Weight], biases: list[torch.Tensor | None]) -> torch.Tensor:
        seen.append(len(x))
        return nf4_linear(x, weights, biases)

    inputs = [normal(rows, 128, dtype=torch.bfloat16) for rows in (5, NF4_MAX_ROWS + 1)]
    with monkeypatch.context() as patch:
        patch.setattr(lora_layers, "on_nf4_kernel", lambda _: False)
        expected = [group(x) for x in inputs]
    monkeypatch.setattr(lora_layers, "nf4_linear", counted)
    for x, exact in zip(inputs, expected, strict=True):
        assert relative_error(group(x), exact) <= tolerance(128, torch.bfloat16)
    assert seen == [5]


def test_weights_with_codes_of_their_own_are_served_one_by_one() -> None:
    """A launch reads one table of codes; weights whose tables hold the same codes share one."""
    layers = [quantized(out, 128, nested=nested) for out, nested in ((64, True), (33, True), (32, False))]
    weights = nf4_weights([layer.weight for layer in layers])
    assert [weight.shares_codes_with(weights[0]) for weight in weights] == [True, True, False]
    x = normal(3, 128, dtype=torch.bfloat16)
    whole = torch.cat([dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers])
    got = nf4_linear(x, weights, [None] * 3)
    assert relative_error(got, x.float() @ whole.float().T) <= tolerance(128, torch.bfloat16)


def test_a_layout_that_is_not_known_is_left_to_bitsandbytes() -> None:
    known, odd = quantized(8, 64), quantized(8, 96)
    assert nf4_weights([known.weight, odd.weight]) == []
    assert len(nf4_weights([known.weight, known.weight])) == 2
    assert Nf4Weight.of(torch.nn.Linear(64, 8).weight) is None
