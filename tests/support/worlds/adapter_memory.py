"""A device without hardware: the arena is a list of numbers, and copies take as many ticks as the test sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from adapters_store.base.description import AdapterDigest
from adapters_store.packed.layout import PackedAdapter

GARBAGE = -1  # the content of a range while a copy is under way


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
    """Writes `tag` to arena[offset:][:num_elements]."""

    offset: int
    num_elements: int
    tag: int
    ticks_left: int

    def __call__(self) -> bool:
        return self.ticks_left == 0


@dataclass
class FakeDevice:
    """A DeviceCopier. A copy is done after `delay(elements)` calls of tick(); 0 means at once."""

    capacity: int
    tag_of: Callable[[AdapterDigest], int]
    delay: Callable[[int], int] = lambda num_elements: 0
    arena: list[int] = field(default_factory=list)
    table: dict[int, tuple[int, int, AdapterDigest]] = field(default_factory=dict)
    copies: list[FakeCopy] = field(default_factory=list)
    num_started: int = 0

    def __post_init__(self) -> None:
        self.arena = [0] * self.capacity

    def start(self, slot: int, offset: int, adapter: PackedAdapter) -> FakeCopy:
        assert slot not in self.table, f"slot {slot} still names an adapter"
        num_elements = adapter.buffer.numel()
        self.num_started += 1
        self.table[slot] = (offset, num_elements, adapter.digest)
        return self._begin(FakeCopy(offset, num_elements, self.tag_of(adapter.digest), self.delay(num_elements)))

    def clear(self, slot: int) -> None:
        del self.table[slot]

    def tick(self) -> None:
        """Time passes on the side stream."""
        for copy in self.copies:
            copy.ticks_left -= 1
        self._finish_done()

    def read(self, slot: int) -> int:
        """The number the whole adapter at this slot consists of: what a forward would see."""
        return self._read(slot, *self.table[slot])

    def _read(self, slot: int, offset: int, num_elements: int, digest: AdapterDigest) -> int:
        tag = self.tag_of(digest)
        place = self.arena[offset : offset + num_elements]
        assert place.count(tag) == num_elements, f"{digest} in slot {slot} was overwritten: {place}"
        return tag

    def _begin(self, copy: FakeCopy) -> FakeCopy:
        self.arena[copy.offset : copy.offset + copy.num_elements] = [GARBAGE] * copy.num_elements
        self.copies.append(copy)
        self._finish_done()
        return copy

    def _finish_done(self) -> None:
        for copy in [copy for copy in self.copies if copy()]:
            self.copies.remove(copy)
            self.arena[copy.offset : copy.offset + copy.num_elements] = [copy.tag] * copy.num_elements
