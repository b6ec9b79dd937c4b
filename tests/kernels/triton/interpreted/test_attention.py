"""Paged attention over recycled, NaN-filled blocks equals the specification computed on each sequence alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lora_kernels.attention import launcher
from lora_kernels.attention import triton_launch as paged
from lora_kernels.attention.batch import AttentionRule, LayerCache, PagedBatch, Rotation
from lora_kernels.attention.launcher import paged_attention
from lora_kernels.attention.query_tiles import attention_tiles
from lora_kernels.attention.reference import attention_reference
from lora_kernels.elementwise.reference import rope_reference
from support.kernels.memory_watch import MemoryWatch
from support.kernels.triton_cases import ALL_FORMS, normal, relative_error

PLAIN, WINDOW, SOFTCAP = AttentionRule(0.3), AttentionRule(0.3, window=10), AttentionRule(0.3, softcap=2.0)
BOTH = AttentionRule(0.2, window=70, softcap=5.0)
RULES_APART = [  # the short form: every pair of size, type and rule
    (head_dim, dtype, rule)
    for head_dim, dtype, (index, rule) in itertools.product(
        [16, 64], [torch.float32, torch.bfloat16], enumerate([PLAIN, WINDOW, SOFTCAP, BOTH])
    )
    if ALL_FORMS or ((head_dim == 16) == (dtype is torch.float32)) == (index < 2)
]
CONTEXTS, FIRST_CHUNKS = (1, 33, 150, 17), (0, 20, 149, 9)


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "on_triton", lambda *_: True)


class World:
    """Four sequences over shuffled blocks of one NaN-filled cache."""

    def __init__(
        self,
        head_dim: int,
        *,
        contexts: Sequence[int] = CONTEXTS,
        heads: tuple[int, int] = (6, 2),
        dtype: torch.dtype = torch.float32,
        page: int = 8,
    ) -> None:
        self.page, self.contexts, self.dtype = page, contexts, dtype
        self.q, self.k, self.v = (
            [normal(c, count, head_dim, dtype=dtype, seed=10 * i + part) for i, c in enumerate(contexts)]
            for part, count in enumerate((heads[0], heads[1], heads[1]))
        )
        width = -(-max(contexts) // page)
        num_blocks = len(contexts) * width + 3
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(head_dim)).numpy()
        self.tables = order[: len(contexts) * width].reshape(len(contexts), width).astype(np.int32)
        shape = (num_blocks, heads[1], page, head_dim)
        self.cache = LayerCache(*(torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)))

    def batch(self, starts: Sequence[int], stops: Sequence[int]) -> PagedBatch:
        active = [i for i, (start, stop) in enumerate(zip(starts, stops, strict=True)) if stop > start]
        positions = np.concatenate([np.arange(starts[i], stops[i]) for i in active]).astype(np.int32)
        counts = [stops[i] - starts[i] for i in active]
        sequences = np.repeat(np.arange(len(active)), counts).astype(np.int32)
        tables = self.tables[active]
        slots = tables[sequences, positions // self.page].astype(np.int64) * self.page + positions % self.page
        return PagedBatch(
            query_starts=np.cumsum([0, *counts]).astype(np.int32),
            context_lens=np.array([stops[i] for i in active], dtype=np.int32),
            block_tables=tables,
            slot_mapping_T=torch.from_numpy(slots),
            positions_T=positions,
            sequences_T=sequences,
            block_size=self.page,
        )

    def fill(self, stops: Sequence[int]) -> None:
        """What earlier steps left in the cache, without running them."""
        for i, stop in enumerate(stops):
            positions = torch.arange(stop)
            blocks = torch.from_numpy(self.tables[i]).long()[positions // self.page]
            self.cache.keys[blocks, :, positions % self.page] = self.k[i][:stop]
            self.cache.values[blocks, :, positions % self.page] = self.v[i][:stop]

    def run(self, starts: Sequence[int], stops: Sequence[int], rule: AttentionRule) -> list[torch.Tensor]:
        batch = self.batch(starts, stops)
        parts = [
            torch.cat([source[i][start:stop] for i, (start, stop) in enumerate(zip(starts, stops, strict=True))])
            for source in (self.q, self.k, self.v)
        ]
        out = paged_attention(*(part.transpose(0, 1) for part in parts), self.cache, batch=batch, rule=rule)
        return list(out.split([stop - start for start, stop in zip(starts, stops, strict=True)]))

    def exact(self, index: int, start: int, rule: AttentionRule) -> torch.Tensor:
        q, k, v = self.q[index][start:], self.k[index], self.v[index]
        return attention_reference(q, k, v, scale=rule.scale, window=rule.window, softcap=rule.softcap)

    def torch_error(self) -> float:
        """What torch's own attention loses in this precision."""
        q, k, v = (part[-1].transpose(0, 1) for part in (self.q, self.k, self.v))
        got = scaled_dot_product_attention(
            q[None], k[None], v[None], scale=PLAIN.scale, is_causal=True, enable_gqa=True
        )
        exact = attention_reference(self.q[-1], self.k[-1], self.v[-1], scale=PLAIN.scale)
        return relative_error(got[0].transpose(0, 1), exact)

    def check(self, first_chunks: Sequence[int], rule: AttentionRule) -> None:
        self.run([0] * len(self.contexts), first_chunks, rule)
        self.check_rest(first_chunks, rule)

    def check_rest(self, first_chunks: Sequence[int], rule: AttentionRule) -> None:
        limit = 2e-6 if self.dtype is torch.float32 else 2 * self.torch_error()
        got = self.run(first_chunks, self.contexts, rule)
        for index, out in enumerate(got):
            assert torch.isfinite(out).all()
            assert relative_error(out, self.exact(index, first_chunks[index], rule)) <= limit, index


@pytest.mark.parametrize(("head_dim", "dtype", "rule"), RULES_APART, ids=str)
def test_chunks_and_decodes_of_a_batch_equal_each_sequence_alone(
    head_dim: int, dtype: torch.dtype, rule: AttentionRule
) -> None:
    World(head_dim, dtype=dtype).check(FIRST_CHUNKS, rule)


@pytest.mark.parametrize("head_dim", [8, 32, 80, 96, 128, 256])
def test_every_head_size_and_page_size(head_dim: int) -> None:
    World(head_dim, contexts=(70, 21), heads=(4, 2), page=16, dtype=torch.float16).check((3, 20), PLAIN)


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (5, 5), (12, 2)])
def test_any_number_of_query_heads_shares_a_key_head(heads: tuple[int, int]) -> None:
    World(16, contexts=(40, 30, 1), heads=heads).check((20, 29, 0), PLAIN)


@pytest.mark.parametrize("rule", [PLAIN, AttentionRule(0.3, window=40), BOTH], ids=str)
@pytest.mark.parametrize("contexts", [(700, 40), (1500, 1)])
def test_a_long_context_is_split_and_joined_in_a_fixed_order(contexts: tuple[int, int], rule: AttentionRule) -> None:
    assert paged.num_splits(4, contexts[0], 512) > 1
    first_chunks = (contexts[0] - 1, contexts[1] - 1)
    world = World(16, contexts=contexts)
    world.fill(first_chunks)
    world.check_rest(first_chunks, rule)
    again = world.run(first_chunks, contexts, rule)
    for first, second in zip(world.run(first_chunks, contexts, rule), again, strict=True):
        assert torch.equal(first, second)


def test_a_chunk_of_a_long_prompt_is_split_too() -> None:
    world = World(16, contexts=(600,))
    world.fill((580,))
    world.check_rest((580,), PLAIN)


@pytest.mark.parametrize("rule", [PLAIN, AttentionRule(0.3, window=600)], ids=str)
def test_a_long_row_among_short_ones_is_shared_by_many_programs(
    rule: AttentionRule, memory_watch: MemoryWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys are cut by its own length; a short row's are read by one program, which writes the result itself."""
    contexts = (4500, 3, 250, 1)
    world = World(16, contexts=contexts)
    before = [context - 1 for context in contexts]
    world.fill(before)
    seen: list[tuple[str, dict[int, int]]] = []
    check = memory_watch._check_programs

    def noted(launch: Any) -> None:
        keys = launch.storage_of(np.uint64(world.cache.keys.data_ptr()))
        reads: dict[int, int] = {}
        for access in (access for access in launch.reads if access.storage == keys):
            reads[access.program] = reads.get(access.program, 0) + access.addresses.size // 16
        seen.append((launch.kernel, reads))
        check(launch)

    monkeypatch.setattr(memory_watch, "_check_programs", noted)
    world.check_rest(before, rule)
    reads = next(reads for kernel, reads in seen if kernel == "attention_kernel")
    visible = [context if rule.window == 0 else min(context, rule.window + 64) for context in contexts]
    assert max(reads.values()) <= max(320, visible[0] // 16 + 64)
    assert len(reads) == 2 * sum(-(-keys // max(reads.values())) for keys in visible)


def test_store_writes_its_own_slots_only() -> None:
    world = World(16)
    world.run([0, 0, 0, 0], [1, 1, 1, 1], PLAIN)
    written = world.cache.keys.isfinite().all(-1)
    assert int(written.sum()) == 4 * 2
    for index in range(4):
        assert torch.equal(world.cache.keys[world.tables[index, 0], :, 0], world.k[index][0])
        assert torch.equal(world.cache.values[world.tables[index, 0], :, 0], world.v[index][0])


def test_a_padding_token_is_stored_nowhere() -> None:
    world = World(16)
    batch = world.batch([0, 0, 0, 0], [1, 1, 1, 1])
    batch.slot_mapping_T[[1, 3]] = -1
    k, v = (torch.stack([source[i][0] for i in range(4)], dim=1) for source in (world.k, world.v))
    paged.store_kv_triton(k, v, world.cache, batch)
    assert int(world.cache.keys.isfinite().all(-1).sum()) == 2 * 2
    assert int(world.cache.values.isfinite().all(-1).sum()) == 2 * 2


@pytest.mark.parametrize(("head_dim", "rotated", "heads"), [(16, 16, (6, 2)), (80, 32, (7, 1)), (64, 64, (3, 3))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_while_storing_equals_rotating_first(
    head_dim: int, rotated: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    """To the bit: q, the cache, and so the result. A padding token neither rotates nor stores."""
    angles = (normal(30, rotated // 2, dtype=torch.float32, seed=4) * 3).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    caches, results = [], []
    for is_first in (True, False):
        world = World(head_dim, contexts=(20, 10), heads=heads, dtype=dtype)
        batch = world.batch([0, 0], [20, 10])
        batch.slot_mapping_T[29] = -1
        fused = torch.cat([torch.cat(part).flatten(1) for part in (world.q, world.k, world.v)], dim=1)
        widths = [heads[0] * head_dim, heads[1] * head_dim, heads[1] * head_dim]
        q, k, v = (part.view(30, -1, head_dim).transpose(0, 1) for part in fused.split(widths, dim=1))
        if is_first:
            q, k = (rope_reference(each[None], cos[None], sin[None])[0] for each in (q, k))
            paged.store_kv_triton(k, v, world.cache, batch)
        else:
            paged.rotate_and_store_triton(q, k, v, world.cache, batch=batch, rotation=Rotation(cos, sin))
        caches.append(world.cache)
        results.append(q[:, :29])
    assert torch.equal(*results)
    for one, other in ((caches[0].keys, caches[1].keys), (caches[0].values, caches[1].values)):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        assert int(one.isfinite().all(-1).sum()) == 29 * heads[1]


def test_a_sequence_of_nan_leaves_its_neighbours_finite() -> None:
    world = World(16)
    world.v[2].fill_(torch.nan)
    out = world.run([0, 0, 0, 0], CONTEXTS, PLAIN)
    assert out[2].isnan().all()
    assert all(torch.isfinite(out[index]).all() for index in (0, 1, 3))


@pytest.mark.parametrize("contexts", [(40, 9), (1500, 40)])
@pytest.mark.parametrize("rule", [PLAIN, AttentionRule(0.3, softcap=2.0)], ids=str)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_query_that_is_not_a_number_gets_no_number(
    contexts: tuple[int, int], rule: AttentionRule, broken: float
) -> None:
    """Also if all scores of a row are -infinity, over one program's keys or over many programs'."""
    world = World(16, contexts=contexts)
    world.k[0][:, :, 3] = world.k[0][:, :, 3].abs() + 8
    world.q[0][-1, 1, 3] = broken
    starts = [contexts[0] - 1, 0]
    world.fill(starts)
    out = world.run(starts, contexts, rule)
    for index, start in enumerate(starts):
        torch.testing.assert_close(out[index], world.exact(index, start, rule), atol=1e-5, rtol=0, equal_nan=True)


def test_tiles_hold_whole_tokens_and_keep_decodes_apart_from_prefills() -> None:
    tiles = attention_tiles(
        np.array([0, 1, 101, 104], dtype=np.int32),
        np.array([900, 150, 3], dtype=np.int32),
        np.arange(6, dtype=np.int32).reshape(3, 2),
        group=3,
        decode_m=16,
        prefill_m=128,
        device=torch.device("cpu"),
    )
    assert tiles.decode.records.tolist() == [[0, 0, 1, 899], [4, 101, 3, 0]]
    assert tiles.prefill.records.tolist() == [[2, 1, 42, 50], [2, 43, 42, 92], [2, 85, 16, 134]]
    assert (tiles.decode.max_context, tiles.prefill.max_context) == (900, 150)
    assert tiles.block_tables.tolist() == [0, 1, 2, 3, 4, 5]
