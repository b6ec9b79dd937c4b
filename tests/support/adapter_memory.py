"""A device without hardware: the arena is a list of numbers, and copies take as many ticks as they are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from adapters_store.base import AdapterDigest
from adapters_store.packed import PackedAdapter

GARBAGE = -1  # what lies in a place while a copy is under way


@dataclass
class FakeClock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


def digest_of(name: str) -> AdapterDigest:
    return AdapterDigest(f"sha256:{name}")


def packed(name: str, num_elements: int) -> PackedAdapter:
    """An adapter of that many float32 elements."""
    return PackedAdapter(digest_of(name), torch.zeros(num_elements), ())


@dataclass
class FakeCopy:
    slot: int
    offset: int
    adapter: PackedAdapter
    ticks_left: int

    def done(self) -> bool:
        return self.ticks_left == 0


@dataclass
class FakeDevice:
    """A DeviceCopier. A copy is done after `delay(adapter)` calls of tick(); 0 means at once."""

    capacity: int
    tag_of: Callable[[AdapterDigest], int]
    delay: Callable[[PackedAdapter], int] = lambda adapter: 0
    arena: list[int] = field(default_factory=list)
    table: dict[int, tuple[int, int, AdapterDigest]] = field(default_factory=dict)
    copies: list[FakeCopy] = field(default_factory=list)
    num_started: int = 0

    def __post_init__(self) -> None:
        self.arena = [0] * self.capacity

    def start(self, slot: int, offset: int, adapter: PackedAdapter) -> FakeCopy:
        assert slot not in self.table, f"slot {slot} still names an adapter"
        copy = FakeCopy(slot, offset, adapter, self.delay(adapter))
        self.num_started += 1
        self.table[slot] = (offset, adapter.buffer.numel(), adapter.digest)
        self._fill(copy, GARBAGE)
        self.copies.append(copy)
        self._finish_done()
        return copy

    def clear(self, slot: int) -> None:
        del self.table[slot]

    def tick(self) -> None:
        """Time passes on the side stream."""
        for copy in self.copies:
            copy.ticks_left -= 1
        self._finish_done()

    def read(self, slot: int) -> int:
        """The number the whole adapter at this slot consists of: what a forward would see."""
        offset, num_elements, digest = self.table[slot]
        tag = self.tag_of(digest)
        place = self.arena[offset : offset + num_elements]
        assert place.count(tag) == num_elements, f"{digest} in slot {slot} was overwritten: {place}"
        return tag

    def _finish_done(self) -> None:
        if not self.copies:
            return
        for copy in self.copies:
            if copy.done():
                self._fill(copy, self.tag_of(copy.adapter.digest))
        self.copies = [copy for copy in self.copies if not copy.done()]

    def _fill(self, copy: FakeCopy, value: int) -> None:
        num_elements = copy.adapter.buffer.numel()
        self.arena[copy.offset : copy.offset + num_elements] = [value] * num_elements
