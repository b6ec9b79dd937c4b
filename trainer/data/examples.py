"""Many encoded examples in a few flat arrays: 4 bytes a token, 8 a run of equal weight, 33 an example.

An example is rebuilt at every access and keeps only the arrays alive. Decides their layout; knows no text.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from trainer.data.types import EncodedExample

DIGEST_BYTES = 16
_KINDS = ("", "chat", "completion", "text")


class ExampleStore:
    """Grows by `add`; an example never changes. token_ends, run_ends: where each example's part of the arrays ends."""

    def __init__(self) -> None:
        self._ids, self._token_ends = array("i"), array("q")
        self._run_ends, self._run_stops, self._run_weights = array("I"), array("I"), array("f")
        self._lines, self._kinds, self._digests = array("I"), array("B"), bytearray()

    def __len__(self) -> int:
        return len(self._kinds)

    def add(self, example: EncodedExample) -> None:
        """Keep a copy. Its digest has at most DIGEST_BYTES bytes and comes back with all of them."""
        assert len(example.digest) <= DIGEST_BYTES, f"a digest of {len(example.digest)} bytes"
        changes = np.flatnonzero(np.diff(example.weights))
        stops = np.append(changes + 1, len(example)).astype(np.uint32)
        self._ids.frombytes(example.input_ids.astype(np.int32).tobytes())
        self._token_ends.append(len(self._ids))
        self._run_stops.frombytes(stops.tobytes())
        self._run_weights.frombytes(example.weights[stops - 1].astype(np.float32).tobytes())
        self._run_ends.append(len(self._run_stops))
        self._lines.append(example.line)
        self._kinds.append(_KINDS.index(example.kind))
        self._digests += example.digest.ljust(DIGEST_BYTES, b"\0")

    def example(self, index: int) -> EncodedExample:
        """A copy of one, as it was added."""
        tokens, runs = _part(self._token_ends, index), _part(self._run_ends, index)
        stops = np.array(self._run_stops[runs], dtype=np.int64)
        weights = np.repeat(np.array(self._run_weights[runs], dtype=np.float32), np.diff(stops, prepend=0))
        digest = bytes(self._digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])
        ids = np.array(self._ids[tokens], dtype=np.int32)
        return EncodedExample(ids, weights, digest, self._lines[index], _KINDS[self._kinds[index]])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every example."""
        ends = np.frombuffer(self._token_ends, dtype=np.int64)
        lengths: NDArray[np.int64] = ends - np.append(0, ends[:-1])
        return lengths

    @property
    def num_supervised(self) -> NDArray[np.int64]:
        """Learned tokens of every example."""
        ends = np.frombuffer(self._run_ends, dtype=np.uint32).astype(np.int64)
        lengths = np.diff(np.frombuffer(self._run_stops, dtype=np.uint32).astype(np.int64), prepend=0)
        firsts = np.append(0, ends[:-1])
        lengths[firsts] = np.frombuffer(self._run_stops, dtype=np.uint32)[firsts]
        learned = np.where(np.frombuffer(self._run_weights, dtype=np.float32) != 0, lengths, 0)
        counts: NDArray[np.int64] = np.add.reduceat(learned, firsts)
        return counts

    @property
    def digests(self) -> NDArray[np.bytes_]:
        """[n], to be compared; a digest's last zero bytes do not show."""
        return np.frombuffer(self._digests, dtype=f"S{DIGEST_BYTES}")


def _part(ends: Sequence[int], index: int) -> slice:
    return slice(ends[index - 1] if index else 0, ends[index])


_Choice = tuple[ExampleStore, NDArray[np.uint32]]  # some of a store's examples, by index


class Examples(Sequence[EncodedExample]):
    """A choice from one or several stores, in order. Choosing and joining copy no token."""

    def __init__(self, choices: Iterable[_Choice]) -> None:
        self._choices = tuple((store, chosen) for store, chosen in choices if len(chosen))
        self._ends = np.cumsum([len(chosen) for _, chosen in self._choices]).tolist()

    @classmethod
    def of(cls, examples: Iterable[EncodedExample]) -> Self:
        """Copies of these."""
        store = ExampleStore()
        for example in examples:
            store.add(example)
        return cls([(store, np.arange(len(store), dtype=np.uint32))])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedExample]: ...
    def __getitem__(self, index: int | slice) -> EncodedExample | list[EncodedExample]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        number = bisect_right(self._ends, place)
        store, chosen = self._choices[number]
        return store.example(int(chosen[place - self._ends[number]]))

    def __add__(self, other: Examples) -> Examples:
        return Examples((*self._choices, *other._choices))

    def where(self, wanted: NDArray[np.bool_]) -> Examples:
        """Those that are true in `wanted` [n], in their order."""
        starts = [0, *self._ends]
        return Examples(
            (store, chosen[wanted[start : start + len(chosen)]])
            for (store, chosen), start in zip(self._choices, starts, strict=False)
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each."""
        return self._of_each("lengths", np.int64)

    @property
    def num_supervised(self) -> int:
        """Learned tokens of all."""
        return int(self._of_each("num_supervised", np.int64).sum())

    @property
    def digests(self) -> NDArray[np.bytes_]:
        """Of each, to be compared."""
        return self._of_each("digests", f"S{DIGEST_BYTES}")

    def _of_each(self, name: str, dtype: Any) -> NDArray[Any]:
        parts = [getattr(store, name)[chosen] for store, chosen in self._choices]
        return np.concatenate([np.empty(0, dtype), *parts])


def lengths_of(examples: Sequence[EncodedExample]) -> NDArray[np.int64]:
    """Tokens of each; of a store's examples without making them."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([len(example) for example in examples], dtype=np.int64)
