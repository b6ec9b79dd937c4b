"""What a Llama-8B step launches: nothing for nothing, no new kernel for a new length, and all of it fits an L4."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from lora_kernels.lora.batch import NO_ADAPTER
from lora_kernels.triton_common.available import triton_switch
from lora_kernels.triton_common.tiles import SM_80, TILES
from support.kernels.triton_compile import SMALLEST_SHARED_LIMIT, SPILLS, TENSOR_CORE
from support.kernels.triton_launches import Launch, recorded_launches
from support.models.llama_step import paged_batch, run_layer, table_of

RANKS = (8, 16, 3, 1, 12, 16, 64, 256)
LORA = ("shrink_kernel", "expand_kernel")
WITH_TENSOR_CORES = ("attention_kernel", "nf4_kernel", *LORA)


def slots(count: int, num_adapters: int, *, tokens: int = 1) -> np.ndarray:
    return np.repeat(np.arange(count) % num_adapters, tokens).astype(np.int32)


def test_a_batch_of_the_bare_base_launches_no_lora_kernel() -> None:
    with recorded_launches() as launches:
        run_layer(paged_batch([1] * 8, [100] * 8), table_of(RANKS), np.full(8, NO_ADAPTER, dtype=np.int32))
    names = [launch.name for launch in launches]
    assert not set(names) & set(LORA)
    assert names.count("store_kv_kernel") == 1


def test_a_group_of_layers_is_one_shrink_and_one_expand_whatever_the_adapters() -> None:
    for num_adapters in (1, 8):
        with recorded_launches() as launches:
            run_layer(paged_batch([1] * 32, [100] * 32), table_of(RANKS), slots(32, num_adapters))
        assert [launch.name for launch in launches if launch.name in LORA] == [*LORA] * 4


def test_dora_and_int8_add_no_launch_and_others_launch_what_they_did_before() -> None:
    """Their kernels are compiled for them, two in all, and no other step meets those."""
    found = []
    for factored, int8 in (((), ()), ((6,), (6,)), ((2,), ()), ((), (2,))):  # six of the slots are in the step
        with recorded_launches() as launches:
            run_layer(paged_batch([1] * 8, [100] * 8), table_of(RANKS, factored, int8), slots(8, 6))
        found.append([(launch.name, launch.key) for launch in launches if launch.name in LORA])
    plain, beside, dora, int8_step = found
    assert beside == plain
    assert dora == int8_step
    assert [name for name, _ in dora] == [*LORA] * 4
    assert not set(dora) & set(plain)


def test_a_group_of_nf4_layers_is_one_launch_and_one_sum() -> None:
    """Weight by weight it would be 14 launches a layer."""
    with recorded_launches() as launches:
        run_layer(paged_batch([1] * 8, [100] * 8), table_of(RANKS), slots(8, 1), nf4=True)
    names = [launch.name for launch in launches]
    assert (names.count("nf4_kernel"), names.count("sum_parts_kernel")) == (4, 4)


def test_few_rows_take_one_launch_where_the_table_says_so() -> None:
    """Rank 16: a row of q/k/v reads 3.1 MB of A, of o 2.1, of down 7.3, of gate/up 14.7."""
    tiles = replace(SM_80, one_launch=replace(SM_80.one_launch, max_bytes=4 << 20))
    for rows, groups in ((1, 2), (32, 0)):
        with recorded_launches(tiles=tiles) as launches:
            run_layer(paged_batch([1] * rows, [100] * rows), table_of((16,) * rows), slots(rows, rows))
        names = [launch.name for launch in launches if launch.name in (*LORA, "one_launch_kernel")]
        assert names == ["one_launch_kernel"] * groups + [*LORA] * (4 - groups)


def test_expand_starts_early_only_where_the_table_says_so() -> None:
    assert [capability for capability, tiles in TILES.items() if tiles.overlaps and capability < 90] == []
    for overlaps in (False, True):
        with recorded_launches(tiles=replace(SM_80, overlaps=overlaps)) as launches:
            run_layer(paged_batch([1], [100]), table_of((16,)), slots(1, 1))
        early = {launch.name: "'launch_pdl': True" in launch.key for launch in launches if launch.name in LORA}
        assert early == {"shrink_kernel": False, "expand_kernel": overlaps}


def test_lengths_counts_and_adapters_never_compile_anything_anew() -> None:
    """The first row of each kind settles what is compiled; 80 others add nothing."""

    def step(rng: np.random.Generator) -> None:
        count = int(rng.integers(1, 65))
        contexts = rng.integers(1, 9000, count)
        run_layer(paged_batch([1] * count, contexts.tolist()), table_of(RANKS[:6]), slots(count, 6))
        tokens = int(rng.integers(65, 3000))
        context = tokens + int(rng.integers(0, 9000))
        run_layer(paged_batch([tokens], [context]), table_of(RANKS[:6]), slots(1, 1, tokens=tokens))

    with recorded_launches() as launches:
        for count, context in ((1, 1), (1, 9000), (64, 9000)):
            run_layer(paged_batch([1] * count, [context] * count), table_of(RANKS[:6]), slots(count, 6))
        for tokens, context in ((65, 65), (65, 9000)):
            run_layer(paged_batch([tokens], [context]), table_of(RANKS[:6]), slots(1, 1, tokens=tokens))
        known = {launch.key for launch in launches}
        rng = np.random.default_rng(0)
        for _ in range(40):
            step(rng)
    assert {launch.key for launch in launches} == known
    assert len(known) <= 24


def test_mixed_ranks_meet_at_most_three_kernels() -> None:
    with recorded_launches() as launches:
        for rank in (1, 3, 8, 16, 17, 32, 33, 64, 100, 256):
            run_layer(paged_batch([1], [10]), table_of((rank,)), slots(1, 1))
    shrinks = {launch.key for launch in launches if launch.name == "shrink_kernel"}
    assert len(shrinks) == 3 * 3  # groups of one, two and three layers


def test_an_operation_that_is_off_is_served_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_switch(), "_off", {"elementwise": "a test", "attention": "a test"})
    with recorded_launches() as launches:
        run_layer(paged_batch([1], [10]), table_of(RANKS), slots(1, 1))
    assert {launch.name for launch in launches} == set(LORA)


def launches_of_a_server(capability: int) -> list[Launch]:
    """Each kernel that an 8B base in bf16 and NF4 meets: decodes and prompts, short, long and windowed."""
    with recorded_launches(capability) as launches:
        for nf4 in (False, True):
            for window in (0, 1024):
                run_layer(paged_batch([1] * 2, [9000, 5]), table_of(RANKS), slots(2, 2), nf4=nf4, window=window)
        run_layer(paged_batch([300], [300]), table_of(RANKS), slots(1, 1, tokens=300))
    return list({launch.key: launch for launch in launches}.values())


@pytest.mark.parametrize("capability", [89])
def test_what_a_server_launches_fits_an_l4_without_a_spill(capability: int, tmp_path: Path) -> None:
    launches = launches_of_a_server(capability)
    assert {launch.name for launch in launches} >= {*WITH_TENSOR_CORES, "store_kv_kernel", "rms_norm_kernel"}
    for launch in launches:
        compiled = launch.compile_for(capability, tmp_path)
        assert compiled.shared_bytes <= SMALLEST_SHARED_LIMIT, launch.key
        assert compiled.stack_bytes == 0, launch.key
        assert compiled.count(*SPILLS) == 0, launch.key
        assert launch.name not in WITH_TENSOR_CORES or compiled.count(*TENSOR_CORE) > 0, launch.key
