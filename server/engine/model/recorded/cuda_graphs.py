"""Steps as CUDA graphs: recorded once per number of tokens and kind of adapters, replayed for any adapters of that kind
and any sequences.

A recording has a row for each token: a short prompt is as many rows as it has tokens. Decides which steps can be
replayed, and by which recording. Knows no kernel: `DecodeBuffers` holds what the recorded launches read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from lora_kernels.triton_common.available import has_triton, triton_switch
from lora_kernels.triton_common.tiles import ALIGN_BYTES
from server.engine.model.batch import Batch
from server.engine.model.recorded.decode_buffers import DecodeBuffers, DeviceTokens
from server.engine.model.rope import ROPES_THAT_SYNCHRONIZE, rope_types
from server.engine.schedule import Schedule, ScheduledRow

Replay = Callable[[], torch.Tensor]
WARM_UPS = 1  # allocates workspaces; kernels were compiled and launched before
# Numbers of rows: the more there are, the less an idle one weighs beside the others
BUCKETS = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 1024, 32))
PROMPT_BUCKETS = (128, 192, 256, 320, 384, 512, 640)  # numbers of tokens, beyond those of rows
SMALL_RANK = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterForm:
    """A step's adapters: of at most this rank (0: none), on these rows of the adapter table (None: on any). special:
    some are int8 or have DoRA's factors."""

    max_rank: int
    modules: frozenset[int] | None = None
    special: bool = False


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """buckets: numbers of tokens that are recorded. max_ranks: the largest rank in a step; 0 is the base alone.
    max_prompt_keys: that the tiles of a step's prompt chunks may read of each layer; above, and at 0, a step with a
    chunk is launched plainly. It must be 0 for a base whose rotary factors depend on a sequence's length: recorded
    tokens know their own position alone.

    with_special: record steps with int8 adapters or DoRA too; else they are launched plainly.

    module_sets: rows of the adapter table, the fewest first. Steps whose adapters touch no others have recordings of
    their own at the smallest rank: a group of layers that no adapter touches is not launched in them.
    """

    buckets: tuple[int, ...]
    max_ranks: tuple[int, ...]
    module_sets: tuple[frozenset[int], ...] = ()
    max_prompt_keys: int = 0
    with_special: bool = False

    @classmethod
    def for_rows(cls, max_rows: int, *, max_rank: int, max_tokens: int = 0, **others: Any) -> GraphSettings:
        """1, 2, 4, 8, 16, 24, ... 64, 80, ... 128, 160, ... max_rows; the base alone, rank 16 and the largest rank.

        max_tokens: of steps with prompts; larger numbers are recorded up to it. others: the other fields."""
        buckets = (*(rows for rows in BUCKETS if rows < max_rows), max_rows)
        buckets += tuple(tokens for tokens in PROMPT_BUCKETS if max_rows < tokens <= max_tokens)
        max_ranks = tuple(sorted({0, min(SMALL_RANK, max_rank), max_rank}))
        return cls(buckets=buckets, max_ranks=max_ranks, **others)

    @cached_property
    def forms(self) -> tuple[AdapterForm, ...]:
        """The first one that fits a step's adapters is the cheapest."""
        small = next((rank for rank in self.max_ranks if rank), None)
        forms: list[AdapterForm] = []
        for rank in self.max_ranks:
            forms += [AdapterForm(rank, modules) for modules in self.module_sets if rank == small]
            forms.append(AdapterForm(rank))
        if self.with_special:
            forms += [AdapterForm(rank, special=True) for rank in self.max_ranks if rank]
        return tuple(forms)

    @property
    def num_recordings(self) -> int:
        return len(self.buckets) * len(self.forms)


@dataclass(frozen=True, slots=True)
class _Recording:
    """One replay, and the batch that its launches read: nothing else keeps that memory."""

    step: Batch
    replay: Replay


@dataclass(eq=False)
class DecodeGraphs:
    """forward: the model's own, on a batch over `buffers`. failure: why there are none.

    Owns all that a replay reads or writes beside weights, caches and adapters: each recording's batch, and the one
    tensor of logits that every recording writes.
    """

    buffers: DecodeBuffers
    forward: Callable[[Batch], torch.Tensor]
    capture: CudaCapture
    settings: GraphSettings
    failure: str | None = field(init=False, default=None)
    _recordings: dict[tuple[int, AdapterForm], _Recording] = field(init=False, default_factory=dict)
    _logits_RW: torch.Tensor | None = field(init=False, default=None)

    @property
    def num_recorded(self) -> int:
        return len(self._recordings)

    @torch.inference_mode()
    def record_all(self) -> None:
        """Largest first, so that the others reuse its memory. If one fails there are no recordings, and every step is
        launched plainly."""
        self.buffers.clear()
        for bucket, form in self._in_order():
            step = self.buffers.step(bucket, form.max_rank, form.modules, special=form.special)
            try:
                replay = self.capture.record(partial(self._write_logits, step))
                self._recordings[bucket, form] = _Recording(step, replay)
            except RuntimeError as error:
                self._recordings.clear()
                self._logits_RW = None
                self.failure = f"{bucket} rows of rank {form.max_rank}: {str(error).partition(chr(10))[0]}"
                _log.warning("no CUDA graphs, decoding is slower: %s", self.failure)
                return

    def takes(self, schedule: Schedule) -> bool:
        """Whether no row needs more than the next token, at least one samples it, and a recording is large enough."""
        rows = schedule.rows
        if not all(map(_is_plain, rows)) or not any(row.samples for row in rows):
            return False
        chunks = [row for row in rows if row.num_tokens > 1 or not row.samples]
        return (not chunks or self._prompt_keys(chunks) <= self.settings.max_prompt_keys) and self.has_room(rows)

    def has_room(self, rows: Sequence[ScheduledRow]) -> bool:
        """Whether a recording is large enough for the rows' tokens."""
        if not self._recordings or sum(row.num_tokens for row in rows) > self.settings.buckets[-1]:
            return False
        if self.buffers.max_rank(rows) > self.settings.max_ranks[-1] or self.buffers.need_plain_launches(rows):
            return False
        if self.buffers.are_special(rows) and not self.settings.with_special:
            return False
        fits = all(len(row.request.block_ids) <= self.buffers.max_blocks for row in rows)
        return fits and self.buffers.table.is_aligned_to(ALIGN_BYTES)

    @torch.inference_mode()
    def run(self, rows: Sequence[ScheduledRow], tokens: DeviceTokens | None = None) -> torch.Tensor:
        """Logits [tokens of the rows, vocabulary]; the next run overwrites them. tokens: see `DecodeBuffers.fill`."""
        count = sum(row.num_tokens for row in rows)
        bucket = next(size for size in self.settings.buckets if size >= count)
        form = self._form_of(rows)
        self.buffers.fill(rows, bucket, tokens)
        return self._recordings[bucket, form].replay()[:count]

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self.buffers.forget(request_id)

    def _write_logits(self, step: Batch) -> torch.Tensor:
        """The forward that is recorded. Its logits [bucket, W] lie in memory that all recordings share: an output of
        its own for each took 0.8 GB at 128 rows of a 128 k vocabulary."""
        logits_RW = self.forward(step)
        if self._logits_RW is None:  # warming up the first, which is the largest
            self._logits_RW = logits_RW.new_empty(self.settings.buckets[-1], logits_RW.shape[1])
        return self._logits_RW[: len(logits_RW)].copy_(logits_RW)

    def _prompt_keys(self, chunks: Sequence[ScheduledRow]) -> int:
        """Each tile of a chunk's tokens reads the keys of all before them."""
        size = self.buffers.tokens_per_tile
        return sum(-(-row.num_tokens // size) * (row.start + row.num_tokens) for row in chunks)

    def _form_of(self, rows: Sequence[ScheduledRow]) -> AdapterForm:
        max_rank, special = self.buffers.max_rank(rows), self.buffers.are_special(rows)
        forms = [form for form in self.settings.forms if form.max_rank >= max_rank and form.special == special]
        if not max_rank or forms[0].modules is None:
            return forms[0]
        touched = set(np.flatnonzero(self.buffers.touched_modules(rows)).tolist())
        return next(form for form in forms if form.modules is None or touched <= form.modules)

    def _in_order(self) -> Iterator[tuple[int, AdapterForm]]:
        for bucket in reversed(self.settings.buckets):
            for form in reversed(self.settings.forms):
                yield bucket, form


def _is_plain(row: ScheduledRow) -> bool:
    """Whether at most the next token is wanted of the row."""
    if row.draft:
        return False
    params = row.request.params
    wants_prompt = params.prompt_logprobs is not None and row.start < len(row.request.prompt_ids)
    return params.max_tokens > 0 and not wants_prompt


class CudaCapture:
    """CUDA's own graphs. They share one memory pool: only one runs at a time on their stream, and its result is read
    before the next is launched."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], torch.Tensor]) -> Replay:
        """Warm up, record, and return a replay. Its result is always the same tensor."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: a loader thread may pin memory meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


def why_no_graphs(config: PretrainedConfig, device: torch.device) -> str | None:
    """Why steps cannot be recorded on this device and base; None: they can."""
    if device.type != "cuda":
        return "no GPU"
    if not has_triton():
        return "Triton is not installed"
    off = [op for op in ("lora", "attention") if op in triton_switch().off]
    if off:
        return f"torch serves {' and '.join(off)}, which waits for the host"
    synchronizing = rope_types(getattr(config, "rope_parameters", None) or {}) & set(ROPES_THAT_SYNCHRONIZE)
    return f"rope_type {synchronizing.pop()} waits for the device" if synchronizing else None
