"""One case of each operation on any device, against its reference: its error, and the error that is allowed.

Used by the self-test at start, by tests and by the GPU suite. Knows operations and references; judges nothing.

The limit is twice the error of torch's own matmul or attention of the same precision on the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from lora_kernels.attention.batch import AttentionRule, LayerCache, PagedBatch, Rotation
from lora_kernels.attention.launcher import paged_attention, rotates_while_storing
from lora_kernels.attention.reference import attention_reference
from lora_kernels.elementwise.launcher import add_rms_norm, rms_norm, rope_in_place, silu_mul
from lora_kernels.elementwise.reference import rms_norm_reference, rope_reference, silu_mul_reference
from lora_kernels.lora.batch import LoraBatch, LoraGroup, LoraTable, Place
from lora_kernels.lora.launcher import add_lora_delta
from lora_kernels.lora.reference import dora_reference, lora_delta_reference
from lora_kernels.nf4.launcher import nf4_linear
from lora_kernels.nf4.reference import nf4_dequantize_reference
from lora_kernels.nf4.weight import NESTED_BLOCK, NF4_BLOCK, Nf4Weight

PAGE = 16
GAP = 64  # NaN elements between adapters: reading beyond one becomes visible
ALIGN = 8  # elements of 16 bits in the widest load
BYTES_TO_TRAINED = 5e-7  # random bytes of A times those of B, as large as numbers after training
FLOAT32_LIMIT = 5e-6
ROUNDINGS = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}  # two roundings of a single number
MAX_CHECKED_ROWS = 512  # of an attention case: the reference keeps rows x context x heads numbers


@dataclass(frozen=True, slots=True)
class Outcome:
    """error: the largest difference, relative to the largest exact value; NaN if a number is not finite."""

    error: float
    limit: float

    @property
    def is_ok(self) -> bool:
        return self.error <= self.limit  # False for NaN


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, the same in every run on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.float() - exact.float()).abs().max() / exact.float().abs().max().clamp_min(1e-6))


@cache
def matmul_limit(in_features: int, dtype: torch.dtype, device: torch.device) -> float:
    """Twice the error of torch's own product of this length and precision: the worst of a few."""
    if dtype is torch.float32:
        return FLOAT32_LIMIT
    errors = []
    for seed in range(8):
        x, weight = (normal(rows, in_features, dtype=dtype, device=device, seed=seed) for rows in (16, 64))
        errors.append(relative_error(x @ weight.T, x.float() @ weight.float().T))
    return 2 * max(errors)


def random_table(
    group: LoraGroup, ranks: Sequence[int], dtype: torch.dtype, device: torch.device, *, special: bool = False
) -> LoraTable:
    """One adapter per slot in an arena of NaN; numbers as large as after training. special: every second slot has
    DoRA's factors, and every third is int8."""
    outs, inputs = group.out_features, group.in_features
    of_factors = sum(outs) * 4 // dtype.itemsize if special else 0
    sizes = [-(-rank * (len(outs) * inputs + sum(outs)) // GAP) * GAP + of_factors for rank in ranks]
    starts = np.cumsum([GAP, *(-(-size // GAP) * GAP + GAP for size in sizes)])
    table = LoraTable(torch.full((int(starts[-1]),), torch.nan, dtype=dtype, device=device), len(outs), len(ranks))
    for slot, (rank, size, start) in enumerate(zip(ranks, sizes, starts[:-1].tolist(), strict=True)):
        table.arena[start : start + size] = normal(size, dtype=dtype, device=device, seed=slot) * 0.05
        ends = np.cumsum([0, *(rank * (inputs + out) for out in outs)]).tolist()
        modules = [(row, end, end + rank * inputs, rank, 0.5 + slot) for row, end in enumerate(ends[:-1])]
        is_int8 = special and slot % 3 == 0
        if is_int8:
            modules = [_as_int8(table, group, start, place) for place in modules]
        table.set_slot(slot, start, modules, is_int8=is_int8)
        if special and slot % 2 == 0:
            _set_factors(table, slot, start + size - of_factors, outs)
    return table


def _as_int8(table: LoraTable, group: LoraGroup, start: int, place: Place) -> Place:
    """Random bytes in the memory of one layer's A and B, its ranks' factors before A. Returns their place."""
    row, a_offset, b_offset, rank, scale = place
    size, generator = table.arena.element_size(), torch.Generator().manual_seed(a_offset + row)
    first = -(-(a_offset + rank * 4 // size) // ALIGN) * ALIGN
    for offset, width in ((first, group.in_features), (b_offset, group.out_features[row])):
        at = (start + offset) * size
        numbers = torch.randint(-127, 128, (rank * width,), generator=generator, dtype=torch.int8)
        table.arena.view(torch.int8)[at : at + rank * width].copy_(numbers)
    factors = (torch.rand(rank, generator=generator) + 0.5) * BYTES_TO_TRAINED
    at = (start + first) * size
    table.arena.view(torch.uint8)[at - 4 * rank : at].view(torch.float32).copy_(factors)
    return row, first, b_offset, rank, scale


def _set_factors(table: LoraTable, slot: int, start: int, outs: Sequence[int]) -> None:
    """Numbers from 0.5 to 1.5 from `start` of the arena."""
    width = 4 // table.arena.element_size()
    ends = np.cumsum([start, *(out * width for out in outs)]).tolist()
    numbers = torch.rand(sum(outs), generator=torch.Generator().manual_seed(slot)) + 0.5
    table.arena[start : ends[-1]].view(torch.float32).copy_(numbers)
    table.set_factors(slot, 0, list(enumerate(ends[:-1])))


def lora_case(
    group: LoraGroup,
    ranks: Sequence[int],
    row_slots: NDArray[np.int32],
    *,
    special: bool = False,
    dtype: torch.dtype,
    device: torch.device,
) -> Outcome:
    """The delta of rows on `row_slots`, added to zeros. special: the worse of this and of int8 and DoRA with a bias."""
    batch = LoraBatch(random_table(group, ranks, dtype, device), row_slots)
    x = normal(len(row_slots), group.in_features, dtype=dtype, device=device, seed=1)
    y = torch.zeros(len(x), sum(group.out_features), dtype=dtype, device=device)
    errors = [relative_error(add_lora_delta(y, x, batch, group), lora_delta_reference(x, batch, group))]
    if special:
        mixed = LoraBatch(random_table(group, ranks, dtype, device, special=True), row_slots)
        base, bias = (normal(*shape, y.shape[1], dtype=dtype, device=device, seed=2) for shape in ((len(x),), ()))
        exact = dora_reference(base, x, mixed, group, bias)
        errors.append(relative_error(add_lora_delta(base, x, mixed, group, bias), exact))
    worst = max(errors, key=lambda error: (math.isnan(error), error))
    return Outcome(worst, matmul_limit(group.in_features, dtype, device))


def attention_case(
    head_dim: int,
    heads: tuple[int, int],
    chunks: Sequence[tuple[int, int]],
    *,
    rule: AttentionRule | None = None,
    is_rotated: bool = False,
    dtype: torch.dtype,
    device: torch.device,
) -> Outcome:
    """heads: of queries and of keys. chunks: (tokens of this step, tokens in the cache after it) of each sequence, over
    shuffled blocks of a cache of NaN. is_rotated: the step's rotary embedding is left to the store."""
    rule = rule or AttentionRule(1 / math.sqrt(head_dim))
    world = _AttentionWorld(head_dim, heads, chunks, dtype, device)
    got = world.run(rule, world.rotate() if is_rotated else None)
    errors, limits = [], []
    for index, (new, context) in enumerate(chunks):
        rows = min(new, MAX_CHECKED_ROWS)
        q, k, v = world.q[index][-rows:], world.k[index], world.v[index]
        exact = attention_reference(q, k, v, scale=rule.scale, window=rule.window, softcap=rule.softcap)
        errors.append(relative_error(got[index][-rows:], exact))
        limits.append(_attention_limit(q, k, v, context))
    worst = int(np.argmax(np.nan_to_num(np.array(errors) / np.array(limits), nan=np.inf)))
    return Outcome(errors[worst], limits[worst])


def _attention_limit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: int) -> float:
    """Twice the error of torch's attention on the same keys (without window or cap, which do not increase it)."""
    if q.dtype is torch.float32:
        return FLOAT32_LIMIT
    scale = 1 / math.sqrt(q.shape[-1])
    mask = torch.ones(len(q), context, dtype=torch.bool, device=q.device).tril(context - len(q))
    query, key, value = (part.transpose(0, 1)[None] for part in (q, k, v))
    result = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    own = result[0].transpose(0, 1)
    return 2 * relative_error(own, attention_reference(q, k, v, scale=scale)) + ROUNDINGS[q.dtype] / 8


class _AttentionWorld:
    """Sequences in a paged cache that already holds all but the step's tokens."""

    def __init__(
        self,
        head_dim: int,
        heads: tuple[int, int],
        chunks: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.chunks = chunks
        news, contexts = zip(*chunks, strict=True)
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.q = [normal(new, heads[0], head_dim, **options, seed=i) for i, new in enumerate(news)]
        self.k, self.v = (
            [normal(context, heads[1], head_dim, **options, seed=seed + i) for i, context in enumerate(contexts)]
            for seed in (100, 200)
        )
        width = -(-max(contexts) // PAGE)
        order = np.random.default_rng(0).permutation(len(chunks) * width + 3)
        self.tables = order[: len(chunks) * width].reshape(len(chunks), width).astype(np.int32)
        shape = (len(order), heads[1], PAGE, head_dim)
        self.cache = LayerCache(*(torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2)))
        for index, (new, context) in enumerate(chunks):
            self._store(index, context - new)

    def _store(self, index: int, stop: int) -> None:
        device = self.cache.keys.device
        positions = torch.arange(stop, device=device)
        blocks = torch.from_numpy(self.tables[index]).long().to(device)[positions // PAGE]
        self.cache.keys[blocks, :, positions % PAGE] = self.k[index][:stop]
        self.cache.values[blocks, :, positions % PAGE] = self.v[index][:stop]

    @property
    def news(self) -> list[int]:
        return [new for new, _ in self.chunks]

    def _step(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of this step's tokens, [heads, T, D]."""
        k, v = (
            torch.cat([whole[-new:] for whole, new in zip(each, self.news, strict=True)]).transpose(0, 1)
            for each in (self.k, self.v)
        )
        return torch.cat(self.q).transpose(0, 1), k, v

    def rotate(self) -> tuple[Rotation, torch.Tensor, torch.Tensor]:
        """A rotation of the step's tokens, and q and k before it; from now on the world's own are rotated."""
        q, k, _ = self._step()
        angles = (normal(q.shape[1], q.shape[2] // 2, dtype=torch.float32, device=q.device, seed=5) * 3).repeat(1, 2)
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        rotated_q, rotated_k = (rope_reference(each[None], cos[None], sin[None])[0].transpose(0, 1) for each in (q, k))
        self.q = list(rotated_q.split(self.news))
        for whole, rotated in zip(self.k, rotated_k.split(self.news), strict=True):
            whole[-len(rotated) :] = rotated
        return Rotation(cos, sin), q, k

    def run(
        self, rule: AttentionRule, before: tuple[Rotation, torch.Tensor, torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """before: what `rotate` returned. If the store cannot rotate, it gets what is rotated."""
        q, k, v = self._step()
        rotation = None
        if before is not None and rotates_while_storing(before[1], before[2], before[0].cos_TR):
            rotation, q, k = before
        batch = paged_batch(self.chunks, self.tables, self.cache.keys.device)
        return list(paged_attention(q, k, v, self.cache, batch=batch, rule=rule, rotation=rotation).split(self.news))


def paged_batch(chunks: Sequence[tuple[int, int]], tables: NDArray[np.int32], device: torch.device) -> PagedBatch:
    """chunks: (tokens of the step, tokens in the cache after it) of each sequence. tables: their blocks."""
    news, contexts = np.array(chunks, dtype=np.int32).T
    starts = np.concatenate(([0], np.cumsum(news))).astype(np.int32)
    sequences = np.repeat(np.arange(len(news), dtype=np.int32), news)
    positions = (np.arange(starts[-1]) + np.repeat(contexts - news - starts[:-1], news)).astype(np.int32)
    slots = tables[sequences, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
    slot_mapping = torch.from_numpy(slots).to(device)
    return PagedBatch(starts, contexts.copy(), tables, slot_mapping, positions, sequences, PAGE)


def random_nf4(
    out: int, inputs: int, device: torch.device, *, nested: bool = True, on_device: bool = False
) -> Nf4Weight:
    """Random codes under bitsandbytes' layout; values about as large as a model's weights. on_device: made there, where
    a model's worth takes no time, but other numbers on each kind of device."""
    maker = device if on_device else torch.device("cpu")
    generator = torch.Generator(maker).manual_seed(out)
    options: dict[str, Any] = {"generator": generator, "device": maker}
    blocks = out * inputs // NF4_BLOCK
    packed = torch.randint(0, 256, (out * inputs // 2,), dtype=torch.uint8, **options).to(device)
    code = torch.linspace(-1, 1, 16, device=device)
    if not nested:
        return Nf4Weight(packed, code, torch.rand(blocks, **options).to(device) * 0.1, out, inputs)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, **options).to(device)
    outer = torch.rand(-(-blocks // NESTED_BLOCK), **options).to(device) * 0.05
    nested_code, offset = torch.linspace(-1, 1, 256, device=device), torch.tensor(0.06, device=device)
    return Nf4Weight(packed, code, absmax, out, inputs, nested_code, outer, offset)


def nf4_case(
    rows: int, out: int, inputs: int, *, nested: bool = True, dtype: torch.dtype, device: torch.device
) -> Outcome:
    """Against the product with the dequantised weight."""
    weight = random_nf4(out, inputs, device, nested=nested)
    x, bias = (normal(*shape, dtype=dtype, device=device, seed=2) for shape in ((rows, inputs), (out,)))
    exact = x.float() @ nf4_dequantize_reference(weight).to(dtype).float().T + bias.float()
    return Outcome(relative_error(nf4_linear(x, [weight], [bias]), exact), matmul_limit(inputs, dtype, device))


def norm_case(tokens: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Outcome:
    x = normal(1, tokens, width, dtype=dtype, device=device) * 3
    weight = normal(width, dtype=dtype, device=device, seed=1)
    exact = rms_norm_reference(x, weight, 1e-6)
    return Outcome(relative_error(rms_norm(x, weight, 1e-6), exact), ROUNDINGS[dtype])


def add_norm_case(
    tokens: int, width: int, *, one_plus: bool = False, dtype: torch.dtype, device: torch.device
) -> Outcome:
    """The worse of the sum and its norm."""
    x, residual = (normal(1, tokens, width, dtype=dtype, device=device, seed=seed) * 3 for seed in (0, 2))
    weight = normal(width, dtype=dtype, device=device, seed=1)
    total, normed = add_rms_norm(x, residual, weight, 1e-6, one_plus=one_plus)
    exact = rms_norm_reference(residual + x, weight, 1e-6, one_plus=one_plus)
    errors = relative_error(total, residual + x), relative_error(normed, exact)
    return Outcome(max(errors, key=lambda error: (math.isnan(error), error)), ROUNDINGS[dtype])


def gate_case(tokens: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Outcome:
    x = normal(tokens, 2 * width, dtype=dtype, device=device) * 8
    return Outcome(relative_error(silu_mul(x), silu_mul_reference(x)), ROUNDINGS[dtype])


def rope_case(tokens: int, heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device) -> Outcome:
    """In place, on heads inside a fused projection."""
    fused = normal(1, tokens, heads * head_dim + 64, dtype=dtype, device=device)
    x = fused[..., : heads * head_dim].view(1, tokens, heads, head_dim).transpose(1, 2)
    angles = (normal(1, tokens, head_dim // 2, dtype=torch.float32, device=device, seed=3) * 3).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    exact = rope_reference(x, cos, sin)
    done = rope_in_place(x, cos, sin)
    return Outcome(relative_error(x, exact) if done else 0.0, ROUNDINGS[dtype])
