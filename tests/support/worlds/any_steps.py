"""A seeded service whose kernels do not run: a real engine over a toy base, for what its steps would launch.

What a kernel leaves is whatever was in memory, so every logit is replaced by zero.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from adapters_store.base.description import AdapterDigest, BaseDescription
from adapters_store.packed.layout import PackedAdapter
from benchmarks.common.shapes import BenchShape
from benchmarks.gpu.random_base import packed_layout, random_tokenizer
from server.engine.engine import Engine
from server.engine.model.base_model import BaseModel
from server.engine.model.recorded.cuda_graphs import DecodeGraphs
from server.engine.model.recorded.decode_buffers import DecodeBuffers
from server.engine.model.runner import ModelRunner
from server.engine.request import Request, SamplingParams
from server.engine.schedule import SchedulerSettings
from server.engine.startup.build import join_engine
from server.engine.startup.covering_steps import StepLimits
from server.engine.startup.settings import EngineSettings, MemoryBudget
from support.kernels.eager_capture import EagerCapture

SHAPE = BenchShape(hidden=128, layers=1, intermediate=192, heads=8, kv_heads=2, vocab=512)
RANKS = (1, 2, 5, 8, 16, 17, 24, 32, 33, 64, 100, 256)
MIB = 1 << 20


class _AllZero:
    """In place of the vocabulary."""

    def served_logits(self, logits_RW: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits_RW)


class AdaptersOfEveryRank:
    """An adapter source: the digest's name ends with the rank; copy 1 has DoRA's factors, copy 2 is int8."""

    fetch = None

    def load_packed(self, digest: AdapterDigest, base: BaseDescription, **_: Any) -> PackedAdapter:
        name, _, rank = str(digest).rpartition("r")
        modules, size = packed_layout(base, int(rank))
        if name.endswith("1"):
            modules = tuple(replace(module, factor_offset=size) for module in modules)
            size += 2 * max(shape.out_features for shape in base.modules.values())
        return PackedAdapter(digest, torch.zeros(size, dtype=torch.bfloat16), modules, is_int8=name.endswith("2"))

    def quarantine_adapter(self, *_: Any, **__: Any) -> None:
        raise AssertionError("no number of this service is looked at")


@dataclass
class AnySteps:
    """Arrivals of every kind, step by step."""

    engine: Engine
    random: random.Random
    max_context: int
    num_done: int = 0
    _ids: Iterator[int] = field(default_factory=itertools.count)

    def step(self) -> None:
        while self.random.random() < 0.5:
            self.engine.add(self._request())
        for event in self.engine.step():
            assert event.error is None, event.error
            self.num_done += event.finish_reason is not None

    def _request(self) -> Request:
        draw = self.random
        most = draw.choice((3, 20, 70, self.max_context - 40))
        rank = draw.choice((None, *RANKS))
        copy = draw.choice((0, 1, 2))
        params = SamplingParams(
            max_tokens=draw.randint(1, 30),
            temperature=0.0,
            ignore_eos=True,
            prompt_logprobs=0 if draw.random() < 0.05 else None,
        )
        adapter = None if rank is None else AdapterDigest(f"sha256:{copy}r{rank}")
        return Request(f"a{next(self._ids)}", draw.choice("xyz"), [5] * draw.randint(1, most), params, adapter)


@contextmanager
def any_steps(base: BaseModel, limits: StepLimits, *, block_size: int, seed: int) -> Iterator[AnySteps]:
    """The engine that `limits` describe; its recordings are made on entry, its worker is not started."""
    settings = EngineSettings(
        base=Path("random"),
        max_adapters=len(RANKS) * 3,
        max_model_len=limits.max_context,
        block_size=block_size,
        scheduler=SchedulerSettings(max_running=limits.max_rows, max_batch_tokens=limits.max_tokens),
        memory=MemoryBudget(kv_cache=64 * MIB, adapter_pool=64 * MIB, host_cache=64 * MIB),
    )
    parts = join_engine(base, random_tokenizer(SHAPE.vocab), settings, AdaptersOfEveryRank())
    runner = parts.engine._runner
    assert isinstance(runner, ModelRunner)
    runner._vocabulary = _AllZero()  # type: ignore[assignment]
    try:
        if limits.graphs is not None:
            buffers = DecodeBuffers(
                runner.table,
                max_rows=limits.graphs.buckets[-1],
                max_context=limits.max_context,
                block_size=block_size,
            )
            runner.graphs = DecodeGraphs(buffers, runner.forward, EagerCapture(), limits.graphs)
        yield AnySteps(parts.engine, random.Random(seed), limits.max_context)
    finally:
        parts.close()
