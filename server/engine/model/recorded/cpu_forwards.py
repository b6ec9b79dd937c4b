"""Forwards on a CPU, recorded once and replayed for any sequences and adapters. Knows batches; knows no kernel.

A forward of 8 rows of a small base is 13 ms through transformers and 10 ms in one replay, which also needs no
interpreter's lock. Batches of one kind run the same kernels; what differs lies in memory that the kernels read. So a
kind that comes again is recorded on its own batch, and each later batch is written over that one.

Trust, but compare: the first replay of a kind runs beside the plain forward, and its logits must have the same bits.
Of kinds with many tokens, whose forwards take long, one is compared for all: a number that a forward takes from
elsewhere than its batch would be wrong in each of them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from lora_kernels.lora.batch import LoraBatch
from lora_kernels.native.bindings import native_ops
from lora_kernels.native.tape import NotRecordable, Tape, TapeMemory
from server.engine.model.base_model import BaseModel
from server.engine.model.batch import Batch, Samples
from server.engine.model.lora_layers import AdapterExperts, AdapterRouter

MAX_TOKENS = 512  # a step's on a CPU by default
FEW_TOKENS = 128
MAX_KINDS = 512  # known at once; a recording takes about 20 KiB beside the shared memory

_log = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """What batches of one recording have in common."""

    num_tokens: int
    num_logits: int
    has_layer_adapters: bool
    has_head_adapters: bool

    @property
    def proof(self) -> _Kind:
        """The kind that is compared for this one."""
        return self if self.num_tokens <= FEW_TOKENS else self._replace(num_tokens=MAX_TOKENS, num_logits=0)


class CpuForwards:
    """`forward`, faster for kinds of batches that come again. failure: why every batch takes the plain one; None: none
    has failed.

    caches: of keys and values.
    """

    def __init__(
        self, forward: Callable[[Batch], torch.Tensor], base: BaseModel, caches: Iterable[torch.Tensor]
    ) -> None:
        self._forward = forward
        self._lasting = [*_weights(base), *caches]
        self._asks_adapters = any(isinstance(part, AdapterRouter | AdapterExperts) for part in base.model.modules())
        self._memory = TapeMemory()
        self._recordings: OrderedDict[_Kind, tuple[Tape, Batch] | None] = OrderedDict()  # None: the kind came once
        self._proved: set[_Kind] = set()
        native = native_ops(base.dtype)
        self._takes_prompts = bool(native and native.takes_prompts)
        self.failure = None if native else "there are no C kernels"
        self.num_replays = 0

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits [R, width of the head]; those of a replay are valid until the next call. The batch is used up: another
        may be written over it."""
        if self.failure is not None or not self._takes(batch):
            return self._forward(batch)
        kind = _kind_of(batch)
        if kind not in self._recordings:
            self._remember(kind)
            return self._forward(batch)
        self._recordings.move_to_end(kind)
        try:
            return self._recorded(kind, batch)
        except NotRecordable as error:
            self._fail(str(error))
            return self._forward(batch)

    def _takes(self, batch: Batch) -> bool:
        if len(batch.paged.positions_T) > MAX_TOKENS or batch.logits_rows_R is None:
            return False
        if not self._takes_prompts and batch.paged.prompt_split(takes_prompts=False).sequences:
            return False  # the library attends from long prompts, each in a call of its own
        adapters = [adapters for adapters in _adapters_of(batch) if adapters is not None]
        return not any(self._asks_adapters or each.token_segments for each in adapters)

    def _remember(self, kind: _Kind) -> None:
        self._recordings[kind] = None
        if len(self._recordings) > MAX_KINDS:
            self._recordings.popitem(last=False)

    def _recorded(self, kind: _Kind, batch: Batch) -> torch.Tensor:
        recording = self._recordings[kind]
        if recording is None:
            kept = replace(batch, samples=Samples())
            tape = Tape(lambda: self._forward(kept), self._memory, (*self._lasting, *_tensors_of(kept)))
            self._recordings[kind] = tape, kept
            return tape.result
        tape, kept = recording
        _write_over(kept, batch)
        if kind.proof in self._proved:
            self.num_replays += 1
            return tape.replay()
        logits_RW = self._forward(batch)
        if not _same_bits(tape.replay(), logits_RW):
            self._fail("a replay gave other logits than the forward that it stands for")
            return logits_RW
        self._proved.add(kind.proof)
        return logits_RW

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._recordings.clear()
        _log.warning("this base's small steps run plainly, which is slower: %s", reason)


def _weights(base: BaseModel) -> Iterator[torch.Tensor]:
    """All that the model holds, also what it joined or keeps beside its parameters."""
    yield from base.model.parameters()
    yield from base.model.buffers()
    for module in base.model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))
        for weight in getattr(module, "resident", ()):
            yield weight
            yield from _tensors_in(getattr(weight, "quant_state", None))


def _tensors_in(quant_state: object) -> Iterator[torch.Tensor]:
    """Of a weight of bitsandbytes: scales and codes, and those of the scales."""
    for value in vars(quant_state).values() if quant_state is not None else ():
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) is type(quant_state):
            yield from _tensors_in(value)


def _kind_of(batch: Batch) -> _Kind:
    num_logits = 0 if batch.logits_rows_R is None else len(batch.logits_rows_R)
    has_adapters = (adapters is not None for adapters in (batch.layer_adapters, batch.head_adapters))
    return _Kind(len(batch.paged.positions_T), num_logits, *has_adapters)


def _adapters_of(batch: Batch) -> tuple[LoraBatch | None, LoraBatch | None]:
    return batch.layer_adapters, batch.head_adapters


def _tensors_of(batch: Batch) -> list[torch.Tensor]:
    """What a forward reads of a batch in tensors."""
    assert batch.logits_rows_R is not None
    ids = (batch.input_ids_1T, batch.position_ids_1T, batch.last_positions_1T)
    return [*ids, batch.logits_rows_R, batch.paged.slot_mapping_T]


def _write_over(recorded: Batch, batch: Batch) -> None:
    """Let the recorded batch be this one, for as long as this one lives."""
    for to, now in zip(_tensors_of(recorded), _tensors_of(batch), strict=True):
        to.copy_(now)
    recorded.paged.read_like(batch.paged)
    for own, other in zip(_adapters_of(recorded), _adapters_of(batch), strict=True):
        if own is not None and other is not None:
            own.read_like(other)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    whole = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return one.shape == other.shape and torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))
