"""Cuts examples into optimizer steps and packs each step into forwards. Knows lengths and seeds; knows no text.

A step's examples depend on seed and epoch alone, so neither the size of a forward nor the number of ranks changes what
is learned. Within a step, forwards are filled evenly and dealt out so that every rank runs as many as every other.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.examples import lengths_of
from trainer.data.types import IGNORED, DataCursor, EncodedExample, PackedBatch, StepBatch


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """examples_per_step, or tokens_per_step if given: what one optimizer step consumes over all ranks.

    micro_batch_tokens: the most one forward holds; at least the longest example. packing False: one example a forward.
    """

    examples_per_step: int = 16
    tokens_per_step: int | None = None
    micro_batch_tokens: int = 2048
    packing: bool = True
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("examples_per_step", "micro_batch_tokens", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise ValueError(f"tokens_per_step must be at least 1, got {self.tokens_per_step}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {self.rank}")


class Batches:
    """All steps of a run, addressed by cursor: the same cursor always gives the same step, on any number of ranks."""

    def __init__(self, examples: Sequence[EncodedExample], settings: BatchSettings) -> None:
        if not examples:
            raise ValueError("no examples to make batches of")
        self._examples = examples
        self._settings = settings
        self._lengths = lengths_of(examples)
        if self._lengths.max() > settings.micro_batch_tokens:
            longest = int(self._lengths.max())
            raise ValueError(f"micro_batch_tokens must hold the longest example ({longest} tokens), got {settings}")
        self._epoch: tuple[int, list[NDArray[np.int64]]] | None = None

    def num_steps(self, epochs: int) -> int:
        """Optimizer steps in the first `epochs` epochs."""
        if self._settings.tokens_per_step is None:
            return epochs * -(-len(self._examples) // self._settings.examples_per_step)
        return sum(len(self.epoch_steps(epoch)) for epoch in range(epochs))

    def epoch_steps(self, epoch: int) -> list[NDArray[np.int64]]:
        """Indices of the examples of every step of an epoch; every example is in exactly one."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self._settings.seed, epoch]).permutation(len(self._examples))
            self._epoch = (epoch, self._cut(order))
        return self._epoch[1]

    def _cut(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        size, budget = self._settings.examples_per_step, self._settings.tokens_per_step
        if budget is None:
            return [order[start : start + size] for start in range(0, len(order), size)]
        parts = _cut_in_order(self._lengths[order].tolist(), budget)
        return [order[part.start : part.stop] for part in parts]

    def at(self, cursor: DataCursor) -> StepBatch:
        """The step under the cursor, this rank's share packed. Raises IndexError behind the epoch's last step."""
        chosen = self.epoch_steps(cursor.epoch)[cursor.step]
        examples = [self._examples[index] for index in chosen.tolist()]
        return StepBatch(
            micro_batches=[pack(share) if share else filler() for share in self._shares(examples)],
            weight=sum(example.weight for example in examples),
            num_tokens=sum(len(example) for example in examples),
        )

    def after(self, cursor: DataCursor) -> DataCursor:
        """The step that follows, in the next epoch if this one is over."""
        is_last = cursor.step + 1 >= len(self.epoch_steps(cursor.epoch))
        return DataCursor(cursor.epoch + 1, 0) if is_last else DataCursor(cursor.epoch, cursor.step + 1)

    def _shares(self, examples: list[EncodedExample]) -> list[list[EncodedExample]]:
        settings = self._settings
        bins = forwards(
            [len(example) for example in examples],
            capacity=settings.micro_batch_tokens if settings.packing else 0,
            multiple_of=settings.world_size,
        )
        return [[examples[index] for index in bin_] for bin_ in bins[settings.rank :: settings.world_size]]


class InOrder:
    """Every example once, in order: for evaluation. A pass packs each forward anew and keeps none.

    Of several ranks each has as many forwards as every other; fillers make up for what does not divide.
    """

    def __init__(
        self, examples: Sequence[EncodedExample], *, micro_batch_tokens: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self._examples = examples
        parts = list(_cut_in_order(lengths_of(examples).tolist(), micro_batch_tokens))
        self._parts = [*parts, *[range(0)] * (-len(parts) % world_size)][rank::world_size]

    def __iter__(self) -> Iterator[PackedBatch]:
        for part in self._parts:
            yield pack([self._examples[index] for index in part]) if part else filler()


def _cut_in_order(lengths: Sequence[int], capacity: int) -> Iterator[range]:
    start = used = 0
    for index, length in enumerate(lengths):
        if index > start and used + length > capacity:
            yield range(start, index)
            start, used = index, 0
        used += length
    if lengths:
        yield range(start, len(lengths))


def forwards(lengths: Sequence[int], *, capacity: int, multiple_of: int = 1) -> list[list[int]]:
    """Bins of indices: no bin above `capacity` tokens (unless it holds one example), their number a multiple.

    First-fit decreasing says how few bins do; then they are filled evenly, longest example first into the emptiest
    bin. Bins come in order of falling size, so that dealing them out in turn gives ranks like amounts; some may be
    empty.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    tight = _first_fit(order, lengths, capacity)
    count = -(-len(tight) // multiple_of) * multiple_of
    even = _evenly(order, lengths, count)
    fits = all(sum(lengths[index] for index in bin_) <= capacity or len(bin_) <= 1 for bin_ in even)
    bins = even if fits else tight + [[] for _ in range(count - len(tight))]
    return sorted((sorted(bin_) for bin_ in bins), key=lambda bin_: (-sum(lengths[index] for index in bin_), bin_))


def _first_fit(order: list[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        place = next((number for number, free in enumerate(room) if free >= lengths[index]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def _evenly(order: list[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for index in order:
        size, number = heapq.heappop(heap)
        bins[number].append(index)
        heapq.heappush(heap, (size + lengths[index], number))
    return bins


def pack(examples: Sequence[EncodedExample]) -> PackedBatch:
    """The examples side by side, positions from 0 in each text."""
    ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    weights = np.concatenate([example.weights for example in examples])
    lengths = [length for example in examples for length in example.segments]
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    labels = np.where(weights != 0, ids, IGNORED)
    are_pairs = all(example.border for example in examples)
    owners = np.repeat(np.arange(len(examples)), [len(example) for example in examples])
    return PackedBatch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        labels=torch.from_numpy(labels)[None],
        weights=torch.from_numpy(weights)[None],
        num_examples=len(examples),
        pairs=torch.from_numpy(owners)[None] if are_pairs else None,
    )


def filler() -> PackedBatch:
    """A forward that teaches nothing, for a rank that has nothing left to do in a step."""
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    positions = torch.arange(2)[None]
    return PackedBatch(zeros, positions, torch.full_like(zeros, IGNORED), torch.zeros(1, 2), num_examples=0)
