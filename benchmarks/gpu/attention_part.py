"""(c) Paged attention against torch's SDPA on the same keys laid out contiguously, at decode and at prefill."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.bench import Bench, Call, Row
from benchmarks.gpu.sizes import Sizes, sizes_for
from benchmarks.roofline import decode_attention
from lora_kernels.attention.batch import AttentionRule, LayerCache
from lora_kernels.attention.launcher import paged_attention
from lora_kernels.check_cases import PAGE, paged_batch

MAX_COPIES = 8


class _Layer:
    """One layer's queries, keys and values for `rows` sequences of `new` tokens over `context` tokens."""

    def __init__(self, bench: Bench, sizes: Sizes, rows: int, new: int, context: int) -> None:
        shape = sizes.model
        head_dim = shape.hidden // shape.heads
        self.rule = AttentionRule(1 / math.sqrt(head_dim))
        blocks = -(-context // PAGE)
        self.keys, self.values = (bench.normal(rows * blocks, shape.kv_heads, PAGE, head_dim) for _ in range(2))
        self.q = bench.normal(shape.heads, rows * new, head_dim)
        self.k, self.v = (bench.normal(shape.kv_heads, rows * new, head_dim) for _ in range(2))
        self.rows, self.new, self.context = rows, new, context
        tables = np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)
        self.batch = paged_batch([(new, context)] * rows, tables, bench.device)

    def ours(self) -> None:
        cache = LayerCache(self.keys, self.values)
        paged_attention(self.q, self.k, self.v, cache, batch=self.batch, rule=self.rule)

    def sdpa(self) -> Call:
        """The cache gathered beforehand, which is not counted."""
        kv_heads, head_dim = self.keys.shape[1], self.keys.shape[3]
        k, v = (
            cache.view(self.rows, -1, kv_heads, PAGE, head_dim)
            .transpose(1, 2)
            .reshape(self.rows, kv_heads, -1, head_dim)[:, :, : self.context]
            .contiguous()
            for cache in (self.keys, self.values)
        )
        q = self.q.view(len(self.q), self.rows, self.new, head_dim).transpose(0, 1).contiguous()
        return partial(
            scaled_dot_product_attention, q, k, v, is_causal=self.new > 1, scale=self.rule.scale, enable_gqa=True
        )


def run(bench: Bench) -> list[Row]:
    """One row per shape and implementation."""
    sizes = sizes_for(toy=bench.toy)
    shapes = [("decode", rows, 1, context) for rows, context in sizes.decode]
    shapes += [("prefill", 1, tokens, tokens) for tokens in sizes.prefill]
    rows: list[Row] = []
    for kind, count, new, context in shapes:
        work = decode_attention(sizes.model, rows=count, context=context)
        copies = max(1, min(MAX_COPIES, -(-sizes.cold_bytes // int(work.num_bytes)))) if kind == "decode" else 1
        layers = [_Layer(bench, sizes, count, new, context) for _ in range(copies)]
        ways: dict[str, list[Call]] = {"ours": [layer.ours for layer in layers]}
        ways["sdpa"] = [layer.sdpa() for layer in layers]
        for name, calls in ways.items():
            seconds = bench.seconds(calls)
            row: Row = {"kind": kind, "rows": count, "new": new, "context": context, "way": name, "us": 1e6 * seconds}
            if kind == "decode":
                row["of_bandwidth"] = work.num_bytes / seconds / bench.bandwidth
            else:
                row["tflop_per_s"] = 2 * context * context * sizes.model.hidden / seconds / 1e12
            rows.append(row)
            bench.keep(rows[-1])
    return rows
