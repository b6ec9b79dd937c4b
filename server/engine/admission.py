"""Decides in which order waiting requests may be admitted. Knows arrival order and adapters; knows no blocks or tokens.

This is the whole admission policy: the scheduler asks it who comes next and does the rest. First come, first served,
where a request whose adapter is not on the device yet is passed over. One line per adapter, so that no step ever looks
at more than a few requests, however many wait.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

from adapters_store.base import AdapterDigest
from server.engine.request import Request

Place = tuple[int, Request]  # place in the queue (smaller is earlier), and who stands there
Head = tuple[int, AdapterDigest | None]


class Starving(NamedTuple):
    """The earliest request whose adapter has found no room on the device for too long."""

    place: int
    adapter: AdapterDigest


def _place_of(head: Head) -> int:
    return head[0]


class FcfsAdmission:
    """The waiting queue and its order.

    lookahead: how many distinct waiting adapters are brought to the device ahead of time.
    starvation_s: after this long without room for its adapter, a request holds back those behind it that use one.
    """

    def __init__(self, *, lookahead: int, starvation_s: float) -> None:
        self._lookahead = lookahead
        self._starvation_s = starvation_s
        self._lines: dict[AdapterDigest | None, OrderedDict[str, Place]] = {}
        self._heads: list[Head] = []  # first place of each line, in order
        self._num_waiting = 0
        self._next_place = 0
        self._front_place = 0

    def __len__(self) -> int:
        return self._num_waiting

    def adapters(self) -> list[AdapterDigest]:
        """Distinct adapters somebody waits for."""
        return [digest for digest in self._lines if digest is not None]

    def push(self, request: Request) -> None:
        """To the back of the queue."""
        line = self._lines.setdefault(request.adapter, OrderedDict())
        if not line:
            self._heads.append((self._next_place, request.adapter))
        line[request.id] = (self._next_place, request)
        self._next_place += 1
        self._num_waiting += 1

    def push_front(self, request: Request) -> None:
        """To the front of the queue: it was running already."""
        line = self._lines.setdefault(request.adapter, OrderedDict())
        if line:
            self._drop_head(line)
        self._front_place -= 1
        line[request.id] = (self._front_place, request)
        line.move_to_end(request.id, last=False)
        self._heads.insert(0, (self._front_place, request.adapter))
        self._num_waiting += 1

    def remove(self, request: Request) -> None:
        """Out of the queue, wherever it stands."""
        line = self._lines[request.adapter]
        if next(iter(line)) != request.id:
            del line[request.id]
        else:
            self._drop_head(line)
            del line[request.id]
            if line:
                insort(self._heads, (next(iter(line.values()))[0], request.adapter), key=_place_of)
            else:
                del self._lines[request.adapter]
        self._num_waiting -= 1

    def line(self, digest: AdapterDigest) -> list[Request]:
        """Everyone who waits for this adapter, in order."""
        return [request for _, request in self._lines.get(digest, {}).values()]

    def wanted(self) -> list[AdapterDigest]:
        """The adapters to have on the device next, the most urgent first."""
        return [digest for _, digest in self._heads[: self._lookahead] if digest is not None]

    def starving(self, no_room_since: Mapping[AdapterDigest, float], now_s: float) -> Starving | None:
        """Whom to hold back others for, if there is somebody."""
        if no_room_since:
            for place, digest in self._heads[: self._lookahead]:
                if digest is not None and now_s - no_room_since.get(digest, now_s) > self._starvation_s:
                    return Starving(place, digest)
        return None

    def walk(self, ready: Collection[AdapterDigest], starving: Starving | None) -> Walk:
        """Candidates in order: the bare base's requests, and those whose adapter is ready."""
        lines = [self._lines[digest] for digest in (None, *ready) if digest in self._lines]
        return Walk([iter(line.values()) for line in lines], starving)

    def _drop_head(self, line: OrderedDict[str, Place]) -> None:
        place = next(iter(line.values()))[0]
        del self._heads[bisect_left(self._heads, place, key=_place_of)]


class Walk:
    """Waiting requests in the order they may be admitted, one candidate at a time. The queue must not change meanwhile.

    While somebody starves, those behind it that use another adapter are left out, even an adapter that runs already:
    each of them would keep bytes in use that the starving one needs. Those before it, and requests of the bare base,
    go on.
    """

    def __init__(self, lines: list[Iterator[Place]], starving: Starving | None) -> None:
        self._starving = starving
        self._heap = [entry for line in lines if (entry := self._next_of(line)) is not None]
        heapify(self._heap)

    @property
    def current(self) -> Request | None:
        """Whose turn it is; None at the end."""
        return self._heap[0][1] if self._heap else None

    def advance(self) -> None:
        """Done with the current request; the next of its line may come."""
        entry = self._next_of(self._heap[0][2])
        if entry is None:
            heappop(self._heap)
        else:
            heapreplace(self._heap, entry)

    def _next_of(self, line: Iterator[Place]) -> tuple[int, Request, Iterator[Place]] | None:
        place = next(line, None)
        if place is None or self._is_held_back(*place):
            return None
        return (*place, line)

    def _is_held_back(self, place: int, request: Request) -> bool:
        if self._starving is None or request.adapter is None:
            return False
        return place > self._starving.place and request.adapter != self._starving.adapter
