"""Shrink and expand equal the float32 specification, whatever the ranks, the shapes and the popularity."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common.popularity import POPULARITIES, Popularity
from lora_kernels.lora import launcher as linear
from lora_kernels.lora import triton_launch as lora
from lora_kernels.lora.batch import NO_ADAPTER, LoraBatch, LoraGroup
from lora_kernels.lora.reference import dora_reference, lora_delta_reference
from lora_kernels.lora.row_tiles import RECORD, row_tiles
from lora_kernels.lora.triton_launch import add_lora_delta_triton
from lora_kernels.triton_common.tiles import DECODE_ROWS, PREFILL_ROWS, SM_80, DeviceTiles
from support.kernels.triton_cases import ALL_FORMS, normal, relative_error, row_slots, tolerance
from support.models.lora import random_table

GROUP = LoraGroup((0, 1, 2), 300, (80, 33, 270))
RANKS = (1, 3, 8, 16, 64, 5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS_ALONE = [  # the short form: every rank, and every pair of type and rows
    case
    for index, case in enumerate(itertools.product([1, 3, 8, 16, 33, 64, 256], DTYPES, [3, 20]))
    if ALL_FORMS or index % 5 == 0
]
ROWS = [(1, torch.bfloat16), (7, torch.float32), (63, torch.bfloat16), (100, torch.bfloat16)]
POPULAR_ROWS = [  # the short form: every popularity among few rows, and every number of rows
    (popularity, num_rows, dtype)
    for popularity, (num_rows, dtype) in itertools.product(POPULARITIES, ROWS)
    if ALL_FORMS or num_rows == 7 or (popularity, num_rows) in {("identical", 63), ("zipf", 100), ("distinct", 1)}
]
FORMS: dict[str, dict[str, Any]] = {
    "two launches": {},
    "one launch": {"one_launch": replace(SM_80.one_launch, max_bytes=1 << 60)},
    "overlapped": {"overlaps": True},
}
in_each_form = pytest.mark.parametrize("form", FORMS, indirect=True)


@pytest.fixture(autouse=True, params=FORMS if ALL_FORMS else ["two launches"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How decode rows are launched for; MULTILORA_ALL_LORA_FORMS=1 runs every test in each."""
    chosen = DeviceTiles(replace(SM_80, **FORMS[request.param]))
    monkeypatch.setattr(lora, "device_tiles", lambda device: chosen)


def delta(x: torch.Tensor, batch: LoraBatch, group: LoraGroup = GROUP) -> torch.Tensor:
    """Through scratch that held NaN."""
    batch.row_tiles.scratch(1 << 20).fill_(torch.nan)
    return add_lora_delta_triton(torch.zeros(len(x), sum(group.out_features), dtype=x.dtype), x, batch, group)


def check(x: torch.Tensor, batch: LoraBatch, group: LoraGroup = GROUP) -> None:
    got = delta(x, batch, group)
    assert torch.isfinite(got).all()
    assert relative_error(got, lora_delta_reference(x, batch, group)) <= tolerance(group.in_features, x.dtype)


@pytest.mark.parametrize(("popularity", "num_rows", "dtype"), POPULAR_ROWS)
def test_every_row_gets_its_own_adapters_delta(popularity: Popularity, num_rows: int, dtype: torch.dtype) -> None:
    batch = LoraBatch(random_table([GROUP], RANKS, dtype, missing=2), row_slots(popularity, num_rows, len(RANKS)))
    check(normal(num_rows, 300, dtype=dtype, seed=3), batch)


@pytest.mark.parametrize(("rank", "dtype", "num_rows"), RANKS_ALONE)
def test_every_rank_alone(rank: int, dtype: torch.dtype, num_rows: int) -> None:
    batch = LoraBatch(random_table([GROUP], [rank], dtype), np.zeros(num_rows, dtype=np.int32))
    check(normal(num_rows, 300, dtype=dtype, seed=rank), batch)


@in_each_form
@pytest.mark.parametrize("num_tokens", [5, 60])
def test_rows_of_many_experts_and_adapters_share_one_launch(num_tokens: int) -> None:
    groups = [LoraGroup((row,), 300, (80,)) for row in range(6)]
    table = random_table(groups, RANKS, torch.bfloat16, missing=2, int8={4})
    experts = np.random.default_rng(num_tokens).integers(0, 5, 2 * num_tokens)
    batch = LoraBatch(table, row_slots("uniform", num_tokens, len(RANKS)))
    tokens = np.repeat(np.arange(num_tokens), 2)
    x = normal(num_tokens, 300, dtype=torch.bfloat16, seed=5)[torch.from_numpy(tokens)]
    of_experts = batch.of_experts(experts, tokens, 5)
    check(x, of_experts, groups[1])
    exact = torch.zeros(len(x), 80)
    for expert in range(5):
        own = np.where(experts == expert, batch.row_slots[tokens], NO_ADAPTER).astype(np.int32)
        exact += lora_delta_reference(x, LoraBatch(table, own), groups[1 + expert])
    assert torch.equal(lora_delta_reference(x, of_experts, groups[1]), exact)


@in_each_form
def test_ranks_from_1_to_256_share_one_launch() -> None:
    ranks = (256, 1, 3, 8, 16, 64)
    slots = np.array([0, 1, 2, 3, 4, 5, NO_ADAPTER, 5, 0], dtype=np.int32)
    batch = LoraBatch(random_table([GROUP], ranks, torch.bfloat16), slots)
    check(normal(9, 300, dtype=torch.bfloat16), batch)


@in_each_form
@pytest.mark.parametrize("group", [LoraGroup((0,), 63, (1,)), LoraGroup((1, 0), 128, (256, 17))], ids=str)
def test_groups_of_one_and_two_members_and_odd_sizes(group: LoraGroup) -> None:
    table = random_table([group], RANKS, torch.bfloat16)
    check(normal(11, group.in_features, dtype=torch.bfloat16), LoraBatch(table, row_slots("uniform", 11, 6)), group)


@pytest.mark.parametrize(("in_features", "splits"), [(100, 1), (1000, 4), (4500, 16)])
def test_long_inputs_are_split_and_summed_in_a_fixed_order(in_features: int, splits: int) -> None:
    group = LoraGroup((0,), in_features, (40,))
    batch = LoraBatch(random_table([group], [16], torch.bfloat16), np.zeros(2, dtype=np.int32))
    assert lora.num_splits(1, in_features, 128, 512) == splits
    x = normal(2, in_features, dtype=torch.bfloat16)
    check(x, batch, group)
    assert torch.equal(delta(x, batch, group), delta(x, batch, group))


@in_each_form
def test_rows_without_an_adapter_are_never_read_or_written() -> None:
    slots = np.array([NO_ADAPTER, 0, NO_ADAPTER, 4], dtype=np.int32)
    batch = LoraBatch(random_table([GROUP], RANKS, torch.bfloat16), slots)
    x, y = normal(4, 300, dtype=torch.bfloat16), torch.zeros(4, 383, dtype=torch.bfloat16)
    x[[0, 2]], y[[0, 2]] = torch.nan, torch.nan
    add_lora_delta_triton(y, x, batch, GROUP)
    assert y[[0, 2]].isnan().all()
    assert torch.isfinite(y[[1, 3]]).all()


@in_each_form
def test_a_nan_row_stays_alone_in_its_tile() -> None:
    batch = LoraBatch(random_table([GROUP], RANKS, torch.bfloat16), np.zeros(3, dtype=np.int32))
    x = normal(3, 300, dtype=torch.bfloat16)
    x[1, 7] = torch.nan
    got = delta(x, batch)
    assert got[1].isnan().all()
    assert torch.isfinite(got[[0, 2]]).all()


def test_zero_b_adapter_leaves_the_base_bit_equal() -> None:
    table = random_table([GROUP], [16], torch.bfloat16)
    for module, out in enumerate(GROUP.out_features):
        offset = int(table.offsets[module, 0, 1])
        table.arena[offset : offset + 16 * out] = 0
    base = normal(5, 383, dtype=torch.bfloat16)
    batch = LoraBatch(table, np.zeros(5, dtype=np.int32))
    assert torch.equal(add_lora_delta_triton(base.clone(), normal(5, 300, dtype=torch.bfloat16), batch, GROUP), base)


@in_each_form
def test_delta_is_added_to_what_the_base_computed_in_strided_tensors() -> None:
    batch = LoraBatch(random_table([GROUP], RANKS, torch.float32), row_slots("distinct", 8, 6))
    wide_x, wide_y = normal(8, 400, dtype=torch.float32), normal(8, 500, dtype=torch.float32)
    x, y = wide_x[:, 50:350], wide_y[:, 60:443]
    expected = y + lora_delta_reference(x, batch, GROUP)
    before = wide_y.clone()
    add_lora_delta_triton(y, x, batch, GROUP)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(wide_y[:, :60], before[:, :60])
    assert torch.equal(wide_y[:, 443:], before[:, 443:])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(("dtype", "num_rows"), [(torch.float32, 7), (torch.bfloat16, 40)])
def test_int8_and_dora_rows_are_right_and_leave_others_their_bits(dtype: torch.dtype, num_rows: int) -> None:
    """Slot 1 is int8, 2 has factors, 3 both. In the plain kernels their rows would be nonsense, the others equal."""
    group = LoraGroup((0, 1), 100, (40, 23))
    table = random_table([group], (5, 20, 16, 3, 40), dtype, int8={1, 3}, factored=(2, 3))
    slots = np.resize(np.array([1, 0, NO_ADAPTER, 3, 2, 4], dtype=np.int32), num_rows)
    if num_rows > 2 * DECODE_ROWS:
        slots = np.sort(np.where(slots == 0, 1, slots))  # tiles of a prompt
    x, y = normal(num_rows, 100, dtype=dtype), normal(num_rows, 63, dtype=dtype, seed=1)
    batch, plain = LoraBatch(table, slots), LoraBatch(table, slots)
    plain.has_int8, plain.scaled_modules = False, None
    without = add_lora_delta_triton(y.clone(), x, plain, group)
    for bias in (None, normal(63, dtype=dtype, seed=2)):
        batch.row_tiles.scratch(1 << 16).fill_(torch.nan)
        got = add_lora_delta_triton(y.clone(), x, batch, group, bias)
        assert relative_error(got, dora_reference(y, x, batch, group, bias)) <= 2 * tolerance(100, dtype)
        others = ~np.isin(slots, (1, 2, 3))
        assert torch.equal(got[others], without[others])


@in_each_form
@pytest.mark.parametrize("num_rows", [7, 40])
def test_deltas_are_added_to_logits_in_float32(num_rows: int) -> None:
    """Where bf16 would round them to 2 ** -8; int8 and DoRA rows among them."""
    table = random_table([GROUP], RANKS, torch.bfloat16, int8={1}, factored=(3,))
    batch = LoraBatch(table, row_slots("uniform", num_rows, len(RANKS)))
    x, logits = normal(num_rows, 300, dtype=torch.bfloat16, seed=3), normal(num_rows, 383, dtype=torch.float32, seed=4)
    exact = dora_reference(logits, x, batch, GROUP)
    got = add_lora_delta_triton(logits.clone(), x, batch, GROUP)
    assert got.dtype is torch.float32
    assert relative_error(got, exact) < 1e-4


@in_each_form
def test_empty_tiles_of_a_captured_batch_do_nothing() -> None:
    batch = LoraBatch(random_table([GROUP], RANKS, torch.bfloat16), row_slots("uniform", 6, 6))
    x = normal(6, 300, dtype=torch.bfloat16)
    expected = delta(x, batch)
    tiles = row_tiles(batch.slots, batch.starts, batch.rows, max_rank=256, device=x.device)
    empty = torch.zeros(9 - tiles.num_tiles, RECORD, dtype=torch.int32)
    batch.__dict__["row_tiles"] = replace(tiles, records=torch.cat([tiles.records, empty]))
    assert relative_error(delta(x, batch), expected) <= tolerance(300, torch.bfloat16)


@pytest.mark.parametrize("slots", [[NO_ADAPTER] * 3, [1, 1, NO_ADAPTER]], ids=["no adapter", "module untouched"])
def test_nothing_is_launched_where_no_adapter_touches_the_group(
    slots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "shrink_kernel", None)
    monkeypatch.setattr(lora, "expand_kernel", None)
    monkeypatch.setattr(lora, "one_launch_kernel", None)
    other = LoraGroup((3,), 300, (20,))
    table = random_table([GROUP, other], [4, 4], torch.bfloat16, missing=1)
    got = delta(normal(3, 300, dtype=torch.bfloat16), LoraBatch(table, np.array(slots, dtype=np.int32)), other)
    assert torch.equal(got, torch.zeros(3, 20, dtype=torch.bfloat16))


@in_each_form
def test_a_cleared_slot_adds_nothing() -> None:
    table = random_table([GROUP], RANKS, torch.float32)
    table.clear_slot(3)
    assert not delta(
        normal(4, 300, dtype=torch.float32), LoraBatch(table, np.array([3, 3, 3, 3], dtype=np.int32))
    ).any()
    mixed = LoraBatch(table, np.array([3, 0, 3, 1], dtype=np.int32))
    assert not delta(normal(4, 300, dtype=torch.float32), mixed)[[0, 2]].any()


def test_tiles_grow_where_a_segment_outgrows_the_decode_tile() -> None:
    table = random_table([GROUP], RANKS, torch.bfloat16)
    few = LoraBatch(table, np.repeat([0, 1], [16, 3]).astype(np.int32)).row_tiles
    many = LoraBatch(table, np.repeat([0, 1], [17, 3]).astype(np.int32)).row_tiles
    assert (few.block_m, few.num_tiles) == (DECODE_ROWS, 2)
    assert (many.block_m, many.num_tiles) == (PREFILL_ROWS, 2)
    long = LoraBatch(table, np.repeat([0, 1], [130, 3]).astype(np.int32)).row_tiles
    assert long.records.tolist() == [[0, 0, 64], [0, 64, 64], [0, 128, 2], [1, 130, 3]]


@pytest.mark.parametrize("form", ["one launch"], indirect=True)
def test_one_launch_needs_neither_of_the_two_and_is_for_decode_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_table([GROUP], RANKS, torch.bfloat16)
    monkeypatch.setattr(lora, "expand_kernel", None)
    few = LoraBatch(table, np.repeat([0, 5], [16, 3]).astype(np.int32))
    check(normal(19, 300, dtype=torch.bfloat16), few)
    many = LoraBatch(table, np.repeat([0, 5], [17, 3]).astype(np.int32))
    with pytest.raises(TypeError, match="NoneType"):
        check(normal(20, 300, dtype=torch.bfloat16), many)


def test_the_launcher_sends_to_triton_what_lies_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "on_triton", lambda *_: True)
    batch = LoraBatch(random_table([GROUP], RANKS, torch.float32), row_slots("zipf", 9, 6))
    weight, x = normal(383, 300, dtype=torch.float32), normal(9, 300, dtype=torch.float32)
    monkeypatch.setattr(linear, "native_ops", lambda dtype: None)
    exact = x @ weight.T + lora_delta_reference(x, batch, GROUP)
    torch.testing.assert_close(linear.group_linear(x, weight, None, batch, GROUP), exact, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(linear.group_linear(x, weight, None, None, GROUP), x @ weight.T)
