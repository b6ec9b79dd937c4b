"""The grouped linear layer with adapters equals its float32 specification, whatever the shapes and popularity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.common.popularity import POPULARITIES, Popularity, choose_adapters
from lora_kernels.lora import launcher
from lora_kernels.lora.batch import NO_ADAPTER, LoraBatch, LoraGroup, LoraTable
from lora_kernels.lora.launcher import add_lora_delta, expert_linear, group_linear
from lora_kernels.lora.reference import lora_delta_reference
from lora_kernels.lora.repacked import is_repacked_here, repacked, repacked_experts
from lora_kernels.native.bindings import native_ops
from support.models.lora import random_table

GROUP = LoraGroup((0, 1, 2), 96, (80, 33, 64))
RANKS = (1, 3, 8, 16, 64, 5)


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and native_ops(torch.float32) is None:
        pytest.skip("no C compiler")
    if request.param == "torch":
        monkeypatch.setattr(launcher, "native_ops", lambda dtype: None)
    return str(request.param)


def row_slots(popularity: Popularity, num_rows: int) -> np.ndarray:
    slots = np.array(choose_adapters(popularity, num_rows, len(RANKS), seed=num_rows), dtype=np.int32)
    slots[::5] = NO_ADAPTER
    return slots


def torch_bf16_error(x: torch.Tensor, group: LoraGroup) -> float:
    """The error of torch's own bf16 matmul on a product of this size, relative to the largest value."""
    weight = torch.randn(64, group.in_features, generator=torch.Generator().manual_seed(1)) * 0.05
    exact = x.float() @ weight.bfloat16().float().T
    return float(((x.bfloat16() @ weight.bfloat16().T).float() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_rows", [1, 7, 63, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_gets_its_own_adapters_delta(
    path: str, popularity: Popularity, num_rows: int, dtype: torch.dtype
) -> None:
    table = random_table([GROUP], RANKS, dtype, missing=2)
    batch = LoraBatch(table, row_slots(popularity, num_rows))
    x = torch.randn(num_rows, 96, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = lora_delta_reference(x, batch, GROUP)

    got = add_lora_delta(torch.zeros(num_rows, 177, dtype=dtype), x, batch, GROUP)

    assert torch.isfinite(got).all()
    error = float((got.float() - exact).abs().max() / exact.abs().max().clamp_min(1e-6))
    limit = 1e-6 if dtype is torch.float32 else 2 * torch_bf16_error(x, GROUP) + (0.01 if path == "torch" else 0.0)
    assert error <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_of_an_expert_gets_its_adapters_delta_of_that_expert(path: str, dtype: torch.dtype) -> None:
    groups = [LoraGroup((row,), 96, (80,)) for row in range(6)]
    table = random_table(groups, RANKS, dtype, missing=2, int8={4})
    batch, tokens = LoraBatch(table, row_slots("uniform", 50)), np.repeat(np.arange(50), 3)
    experts = np.random.default_rng(0).integers(0, 5, 150)
    x = torch.randn(150, 96, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = torch.zeros(150, 80)
    for expert in range(5):
        own = np.where(experts == expert, batch.row_slots[tokens], NO_ADAPTER).astype(np.int32)
        exact += lora_delta_reference(x, LoraBatch(table, own), groups[1 + expert])

    of_experts = batch.of_experts(experts, tokens, 5)
    got = add_lora_delta(torch.zeros(150, 80, dtype=dtype), x, of_experts, groups[1])

    error = float((got.float() - exact).abs().max() / exact.abs().max())
    limit = 1e-6 if dtype is torch.float32 else 2 * torch_bf16_error(x, groups[0]) + (0.01 if path == "torch" else 0.0)
    assert error <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("in_features", "out"), [(64, 96), (97, 33), (256, 250), (258, 352)])
def test_rows_of_experts_have_the_bits_of_linear_layers_beside_any_others(
    in_features: int, out: int, dtype: torch.dtype
) -> None:
    native = native_ops(dtype)
    assert native is not None
    if not native.linear_max_rows:
        pytest.skip("this machine has no product of ours")
    counts = [0, 1, 3, 40, 0, 8, 9, 0]
    starts = np.concatenate([[0], np.cumsum(counts)])
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(len(counts), out, in_features, generator=generator).to(dtype)
    x = torch.randn(sum(counts), in_features, generator=generator).to(dtype)
    group = LoraGroup((0,), in_features, (out,))
    got = expert_linear(x, weight, starts, None, group)
    exact = torch.cat(
        [x[starts[expert] : starts[expert + 1]].double() @ weight[expert].double().T for expert in range(len(counts))]
    )
    limit = 1e-6 if dtype is torch.float32 else 2.0**-8
    assert float((got.double() - exact).abs().max() / exact.abs().max()) < limit
    in_order = repacked_experts(weight)
    if in_order is not None:
        assert torch.equal(expert_linear(x, in_order, starts, None, group), got)
    for expert in range(len(counts)):
        rows = slice(starts[expert], starts[expert + 1])
        if native.linear_min_rows == 1 or counts[expert] > 1:
            assert torch.equal(got[rows], group_linear(x[rows], weight[expert], None, None, group))
        for row in range(rows.start, rows.stop):
            alone = np.where(np.arange(len(starts)) > expert, 1, 0)
            assert torch.equal(expert_linear(x[row : row + 1], weight, alone, None, group)[0], got[row])


def test_what_a_step_touches_is_looked_up_for_modules_before_experts_alone() -> None:
    """A base may have 12,288 rows of experts, and every step asks."""
    table = LoraTable(torch.zeros(64), 7, 3, first_expert=2)
    table.set_slot(0, 0, [(1, 0, 8, 1, 1.0), (4, 16, 24, 1, 1.0)], factors=[(1, 32)])
    table.set_slot(2, 0, [(0, 0, 8, 1, 1.0)])
    batch = LoraBatch(table, np.array([2, 0, NO_ADAPTER], dtype=np.int32))
    assert batch.touched_modules.tolist() == [True, True]
    assert batch.scaled_modules is not None
    assert batch.scaled_modules.tolist() == [False, True]
    assert table.touched_by([2]).tolist() == [True, False]
    assert table.touched_by([]).tolist() == [False, False]
    assert batch.has_experts


@pytest.mark.parametrize("num_rows", [1, 7, 63, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_adapters_answer_beside_others_of_the_batch(path: str, num_rows: int, dtype: torch.dtype) -> None:
    table = random_table([GROUP], RANKS, dtype, int8={0, 1, 3, 4})
    slots = row_slots("uniform", num_rows)
    batch = LoraBatch(table, slots)
    x = torch.randn(num_rows, 96, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = lora_delta_reference(x, batch, GROUP)

    got = add_lora_delta(torch.zeros(num_rows, 177, dtype=dtype), x, batch, GROUP)

    error = float((got.float() - exact).abs().max() / exact.abs().max().clamp_min(1e-6))
    limit = 1e-6 if dtype is torch.float32 else 2 * torch_bf16_error(x, GROUP) + (0.01 if path == "torch" else 0.0)
    assert error <= limit
    table.int8[:] = 0
    others = np.isin(slots, (NO_ADAPTER, 2, 5))
    alone = LoraBatch(table, np.where(others, slots, NO_ADAPTER).astype(np.int32))
    beside = add_lora_delta(torch.zeros(num_rows, 177, dtype=dtype), x, alone, GROUP)
    assert torch.equal(got[others], beside[others]), "the other rows keep their bits"


@pytest.mark.parametrize("num_rows", [1, 6, 8, 31, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_base_product_and_delta_in_one_call_equal_the_two(path: str, num_rows: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    weight = (torch.randn(177, 96, generator=generator) * 0.1).bfloat16()
    bias = torch.randn(177, generator=generator).bfloat16() if with_bias else None
    x = torch.randn(num_rows, 96, generator=generator).bfloat16()
    batch = LoraBatch(random_table([GROUP], RANKS, torch.bfloat16), row_slots("distinct", num_rows))
    exact = x.float() @ weight.float().T + lora_delta_reference(x, batch, GROUP)
    exact += 0 if bias is None else bias.float()

    got = group_linear(x, weight, bias, batch, GROUP).float()

    assert float((got - exact).abs().max() / exact.abs().max()) < 0.01


@pytest.mark.parametrize("in_features", [1, 96, 97, 1024])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 16, 17, 24, 33, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_product_at_odd_sizes(num_rows: int, in_features: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    weight = (torch.randn(113, in_features, generator=generator) * 0.1).to(dtype)
    bias, x = torch.randn(113, generator=generator).to(dtype), torch.randn(num_rows, in_features).to(dtype)
    exact = x.double() @ weight.double().T + bias.double()

    got = group_linear(x, weight, bias, None, LoraGroup((0,), in_features, (113,)))

    limit = max(1e-6, 4e-9 * in_features) if dtype is torch.float32 else 2.0**-8  # sums run in one order
    assert float((got.double() - exact).abs().max() / exact.abs().max()) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_features", [64, 90, 1024])
def test_where_the_kernel_takes_any_number_of_rows_a_row_has_the_same_bits_in_each(
    in_features: int, dtype: torch.dtype
) -> None:
    native = native_ops(dtype)
    assert native is not None
    takes_all = native.linear_min_rows == 1 and native.linear_max_rows > 1 << 32
    weight, x = torch.randn(113, in_features).to(dtype), torch.randn(300, in_features).to(dtype)
    group = LoraGroup((0,), in_features, (113,))
    whole = group_linear(x, weight, None, None, group)
    for num_rows in (1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 48, 64, 65, 130):
        part = group_linear(x[:num_rows], weight, None, None, group)
        if takes_all:
            assert torch.equal(part, whole[:num_rows]), num_rows
        torch.testing.assert_close(part.float(), whole[:num_rows].float(), atol=0.5, rtol=2.0**-7)


@pytest.mark.parametrize("in_features", [2, 30, 96, 1024])
@pytest.mark.parametrize("out_features", [(16,), (32, 16, 64), (224, 32)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_repacked_weights_give_the_bits_of_weights_as_they_lie(
    out_features: tuple[int, ...], in_features: int, with_bias: bool
) -> None:
    native, total = native_ops(torch.bfloat16), sum(out_features)
    weight = torch.randn(total, in_features).bfloat16()
    assert native is not None
    assert is_repacked_here(weight) is bool(native.repacks)
    assert not is_repacked_here(weight[:-1])
    assert not is_repacked_here(weight[:, :-1])
    if not native.repacks:
        return
    bias = torch.randn(total).bfloat16() if with_bias else None
    group = LoraGroup(tuple(range(len(out_features))), in_features, out_features)
    table, x = random_table([group], RANKS, torch.bfloat16), torch.randn(130, in_features).bfloat16()
    for num_rows in (*range(27), 64, 130):
        batch = LoraBatch(table, row_slots("distinct", num_rows))
        for adapters in (None, batch):
            got = group_linear(x[:num_rows], repacked(weight), bias, adapters, group)
            assert torch.equal(got, group_linear(x[:num_rows], weight, bias, adapters, group)), num_rows


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 17, 33, 130])
@pytest.mark.parametrize("out", [(113,), (96,), (32, 16, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_sums_in_float32_are_those_that_a_bf16_product_rounds(
    out: tuple[int, ...], num_rows: int, with_bias: bool
) -> None:
    """Logits: 256 times as exact, from the same sums, with adapters of every kind, and a row alone as beside others."""
    native, total = native_ops(torch.bfloat16), sum(out)
    assert native is not None
    if not native.linear_max_rows:
        pytest.skip("this machine has no product of ours")
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(total, 96, generator=generator).bfloat16()
    bias = torch.randn(total, generator=generator).bfloat16() if with_bias else None
    x = torch.randn(num_rows, 96, generator=generator).bfloat16()
    group = LoraGroup(tuple(range(len(out))), 96, out)
    batch = LoraBatch(random_table([group], RANKS, torch.bfloat16, int8={1, 4}), row_slots("distinct", num_rows))
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    with_adapters = exact + lora_delta_reference(x, batch, group)

    bare = group_linear(x, weight, bias, None, group, dtype=torch.float32)
    mixed = group_linear(x, weight, bias, batch, group, dtype=torch.float32)

    assert bare.dtype is mixed.dtype is torch.float32
    for got, wanted in ((bare, exact), (mixed, with_adapters)):
        assert float((got.double() - wanted).abs().max() / wanted.abs().max()) < 2e-6
    if native.linear_min_rows <= num_rows:
        assert torch.equal(bare.bfloat16(), group_linear(x, weight, bias, None, group))
    assert torch.equal(mixed[batch.row_slots == NO_ADAPTER], bare[batch.row_slots == NO_ADAPTER])
    in_place = add_lora_delta(bare.clone(), x, batch, group, bias)
    assert torch.equal(in_place, mixed)
    if is_repacked_here(weight):
        assert torch.equal(group_linear(x, repacked(weight), bias, batch, group, dtype=torch.float32), mixed)
    if native.linear_min_rows == 1:
        assert torch.equal(group_linear(x[:1], weight, bias, None, group, dtype=torch.float32), bare[:1])


def test_a_repacked_weight_has_its_rows_side_by_side() -> None:
    weight = torch.arange(48 * 4).view(48, 4)
    first, second, last = repacked(weight).split([64, 64, 64])
    assert first.tolist() == weight[:32, :2].flatten().tolist()
    assert second.tolist() == weight[:32, 2:].flatten().tolist()
    assert last.view(2, 16, 2)[1].tolist() == weight[32:, 2:].tolist()


def test_rows_without_an_adapter_are_bit_equal_to_the_base(path: str) -> None:
    weight, x = torch.randn(177, 96).bfloat16(), torch.randn(12, 96).bfloat16()
    slots = np.array([NO_ADAPTER, 0, 1] * 4, dtype=np.int32)
    batch = LoraBatch(random_table([GROUP], RANKS, torch.bfloat16), slots)
    mixed, bare = group_linear(x, weight, None, batch, GROUP), group_linear(x, weight, None, None, GROUP)
    assert torch.equal(mixed[slots == NO_ADAPTER], bare[slots == NO_ADAPTER])
    assert not torch.equal(mixed, bare)


def test_zero_b_adapter_is_bit_equal_to_the_base(path: str) -> None:
    table = random_table([GROUP], [16], torch.bfloat16)
    for module, out in enumerate(GROUP.out_features):
        offset = int(table.offsets[module, 0, 1])
        table.arena[offset : offset + 16 * out] = 0
    weight, x = torch.randn(177, 96).bfloat16(), torch.randn(9, 96).bfloat16()
    batch = LoraBatch(table, np.zeros(9, dtype=np.int32))
    assert torch.equal(group_linear(x, weight, None, batch, GROUP), group_linear(x, weight, None, None, GROUP))


def test_result_of_a_row_does_not_depend_on_the_order_of_rows(path: str) -> None:
    table = random_table([GROUP], RANKS, torch.float32)
    slots, x = row_slots("uniform", 50), torch.randn(50, 96)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    straight = add_lora_delta(torch.zeros(50, 177), x, LoraBatch(table, slots), GROUP)
    shuffled = add_lora_delta(torch.zeros(50, 177), x[order], LoraBatch(table, slots[order.numpy()]), GROUP)
    tolerance = 0.0 if path == "native" else 1e-5
    torch.testing.assert_close(straight[order], shuffled, atol=tolerance, rtol=0)


def test_a_cleared_slot_adds_nothing() -> None:
    table = random_table([GROUP], RANKS, torch.float32)
    table.clear_slot(3)
    x = torch.randn(4, 96)
    got = add_lora_delta(torch.zeros(4, 177), x, LoraBatch(table, np.full(4, 3, dtype=np.int32)), GROUP)
    assert torch.equal(got, torch.zeros(4, 177))
