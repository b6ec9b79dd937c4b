"""Paged attention over recycled, NaN-filled blocks equals the specification computed on each sequence alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lora_kernels.attention import launcher
from lora_kernels.attention.batch import AttentionRule, LayerCache, PagedBatch
from lora_kernels.attention.launcher import paged_attention
from lora_kernels.attention.reference import attention_reference
from lora_kernels.native.bindings import native_ops

BLOCK = 8


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and native_ops(torch.float32) is None:
        pytest.skip("no C compiler")
    if request.param == "torch":
        monkeypatch.setattr(launcher, "native_ops", lambda dtype: None)
    return str(request.param)


def make_batch(
    contexts: list[int], queries: list[int], table: np.ndarray, are_prompts: NDArray[np.bool_] | None = None
) -> PagedBatch:
    positions = np.concatenate([np.arange(c - q, c) for c, q in zip(contexts, queries, strict=True)]).astype(np.int32)
    sequences = np.repeat(np.arange(len(queries)), queries).astype(np.int32)
    blocks = table[sequences, positions // BLOCK].astype(np.int64)
    return PagedBatch(
        query_starts=np.cumsum([0, *queries]).astype(np.int32),
        context_lens=np.array(contexts, dtype=np.int32),
        block_tables=table,
        slot_mapping_T=torch.from_numpy(blocks * BLOCK + positions % BLOCK),
        positions_T=positions,
        sequences_T=sequences,
        block_size=BLOCK,
        are_prompts=are_prompts,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 16, 64])
@pytest.mark.parametrize(
    "rule", [AttentionRule(0.3), AttentionRule(0.3, window=10), AttentionRule(0.3, softcap=2.0)], ids=str
)
def test_chunks_and_decodes_of_a_batch_equal_each_sequence_alone(
    path: str, dtype: torch.dtype, head_dim: int, rule: AttentionRule
) -> None:
    contexts, first_chunks = [1, 33, 250, 17], [0, 20, 249, 9]
    generator = torch.Generator().manual_seed(head_dim)
    keys = [torch.randn(c, 2, head_dim, generator=generator).to(dtype) for c in contexts]
    values = [torch.randn(c, 2, head_dim, generator=generator).to(dtype) for c in contexts]
    queries = [torch.randn(c, 6, head_dim, generator=generator).to(dtype) for c in contexts]
    blocks = torch.randperm(64, generator=generator).numpy().astype(np.int32)
    table = np.resize(blocks, (4, 64))
    for row, start in enumerate([0, 1, 6, 40]):
        table[row] = np.roll(blocks, -start)
    shape = (64, 2, BLOCK, head_dim)
    cache = LayerCache(torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))

    def run(starts: list[int], stops: list[int]) -> list[torch.Tensor]:
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        active = [i for i, length in enumerate(lengths) if length]
        batch = make_batch([stops[i] for i in active], [lengths[i] for i in active], table[active])
        parts = [
            torch.cat([source[i][starts[i] : stops[i]] for i in active]).transpose(0, 1)
            for source in (queries, keys, values)
        ]
        out = paged_attention(parts[0], parts[1], parts[2], cache, batch=batch, rule=rule)
        return list(out.split([lengths[i] for i in active]))

    run([0, 0, 0, 0], first_chunks)
    got = run(first_chunks, contexts)

    for index, out in enumerate(got):
        q = queries[index][first_chunks[index] :]
        exact = attention_reference(
            q, keys[index], values[index], scale=rule.scale, window=rule.window, softcap=rule.softcap
        )
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out.float(), exact, atol=1e-5 if dtype is torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize(("head_dim", "heads"), [(16, (2, 2)), (64, (5, 1)), (80, (6, 2)), (256, (4, 1))], ids=str)
@pytest.mark.parametrize(
    "rule", [AttentionRule(0.1), AttentionRule(0.1, window=70), AttentionRule(0.1, softcap=5.0)], ids=str
)
def test_a_prompt_is_the_same_however_it_is_cut(rule: AttentionRule, head_dim: int, heads: tuple[int, int]) -> None:
    length, (q_heads, kv_heads) = 333, heads
    generator = torch.Generator().manual_seed(head_dim)
    q, k, v = (
        torch.randn(length, count, head_dim, generator=generator).bfloat16() for count in (q_heads, *2 * [kv_heads])
    )
    table = torch.randperm(48, generator=generator).numpy().astype(np.int32)[None, :]
    native = native_ops(torch.bfloat16)
    assert native is not None

    def run(cuts: list[int]) -> torch.Tensor:
        shape = (48, kv_heads, BLOCK, head_dim)
        cache = LayerCache(*(torch.full(shape, torch.nan, dtype=torch.bfloat16) for _ in range(2)))
        parts = []
        for start, stop in pairwise(cuts):
            batch = make_batch([stop], [stop - start], table, are_prompts=np.array([True]))
            own = (tensor[start:stop].transpose(0, 1) for tensor in (q, k, v))
            parts.append(paged_attention(*own, cache, batch=batch, rule=rule))
        return torch.cat(parts)

    whole = run([0, length])
    exact = attention_reference(q, k, v, scale=rule.scale, window=rule.window, softcap=rule.softcap)
    torch.testing.assert_close(whole.float(), exact, atol=2e-2, rtol=0)
    for cuts in ([0, 64, length], [0, 17, 133, 200, length], [0, 320, 332, length]):
        parts = run(cuts)
        torch.testing.assert_close(parts.float(), whole.float(), atol=2e-2, rtol=0)
        assert not native.takes_prompts or torch.equal(parts, whole), cuts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [AttentionRule(0.3), AttentionRule(0.3, softcap=2.0)], ids=str)
@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf, 3e38, -3e38])
@pytest.mark.parametrize("is_one_sided", [False, True], ids=["mixed", "one-sided"])
def test_a_query_that_is_not_a_number_gets_no_number(
    *, path: str, dtype: torch.dtype, rule: AttentionRule, length: int, broken: float, is_one_sided: bool
) -> None:
    """A plausible answer would hide a broken adapter from the check of its logits. One-sided: all of its scores are
    infinity, or all are -infinity."""
    context = 140
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(heads, count, 16, generator=generator).to(dtype)
        for heads, count in ((4, length), (2, context), (2, context))
    )
    q[1, -1, 3] = broken
    if is_one_sided:
        k[:, :, 3] = k[:, :, 3].abs() + 8
    q_THD, k_CHD, v_CHD = (tensor.transpose(0, 1) for tensor in (q, k, v))
    exact = attention_reference(q_THD, k_CHD, v_CHD, scale=rule.scale, softcap=rule.softcap)
    table = torch.randperm(32, generator=generator).numpy().astype(np.int32)[None, :]
    cache = LayerCache(*(torch.zeros(32, 2, BLOCK, 16, dtype=dtype) for _ in range(2)))
    earlier = make_batch([context - length], [context - length], table)
    before = (tensor[:, : context - length] for tensor in (k, v))
    paged_attention(torch.zeros(4, context - length, 16, dtype=dtype), *before, cache, batch=earlier, rule=rule)
    batch = make_batch([context], [length], table, are_prompts=np.array([length > 1]))
    out = paged_attention(q, *(tensor[:, -length:] for tensor in (k, v)), cache, batch=batch, rule=rule)
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=0, equal_nan=True)
