"""One tenant's waiting requests, in order: a line for each adapter. Knows arrival order and adapters; knows no other
tenant."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from heapq import heapify, heappop, heapreplace

from adapters_store.base.description import AdapterDigest
from server.engine.queueing.fair_share import TenantAccount
from server.engine.request import Request

Place = tuple[int, Request]  # place in the queue (smaller is earlier), and who stands there
Head = tuple[int, AdapterDigest | None]
Filter = Callable[[int, AdapterDigest], bool]  # place and adapter -> whether it is held back


def _place_of(head: Head) -> int:
    return head[0]


class TenantQueue:
    """account: whose queue it is. load_entry: breaks ties of `account.load`, who came first is first."""

    def __init__(self, account: TenantAccount) -> None:
        self.account = account
        self.lines: dict[AdapterDigest | None, OrderedDict[str, Place]] = {}
        self.heads: list[Head] = []  # first place of each line, in order
        self.load_entry = 0

    @property
    def num_adapters(self) -> int:
        return len(self.lines) - (None in self.lines)

    def push(self, place: int, request: Request) -> bool:
        """To the back; whether a line begins."""
        line = self.lines.get(request.adapter)
        is_new = line is None
        if line is None:
            line = self.lines[request.adapter] = OrderedDict()
            self.heads.append((place, request.adapter))
        line[request.id] = (place, request)
        return is_new

    def push_front(self, place: int, request: Request) -> None:
        """To the front, at a place before all others."""
        line = self.lines.setdefault(request.adapter, OrderedDict())
        if line:
            self._drop_head(line)
        line[request.id] = (place, request)
        line.move_to_end(request.id, last=False)
        self.heads.insert(0, (place, request.adapter))

    def remove(self, request: Request) -> bool:
        """Out of the queue, wherever it stands; whether the heads of the lines have changed."""
        line = self.lines[request.adapter]
        if next(iter(line)) != request.id:
            del line[request.id]
            return False
        self._drop_head(line)
        del line[request.id]
        if line:
            insort(self.heads, (next(iter(line.values()))[0], request.adapter), key=_place_of)
        else:
            del self.lines[request.adapter]
        return True

    def candidates(self, ready: Collection[AdapterDigest], is_held_back: Filter | None) -> TenantWalk | None:
        """The bare base's requests and those whose adapter is ready, in order; None if there is none of them."""
        if len(self.lines) <= len(ready) + 1:
            lines = [line for digest, line in self.lines.items() if digest is None or digest in ready]
        else:
            lines = [self.lines[digest] for digest in (None, *ready) if digest in self.lines]
        return TenantWalk(lines, is_held_back) if lines else None

    def _drop_head(self, line: OrderedDict[str, Place]) -> None:
        place = next(iter(line.values()))[0]
        del self.heads[bisect_left(self.heads, place, key=_place_of)]


class TenantWalk:
    """One tenant's requests in the order they may be admitted. The queue must not change meanwhile."""

    def __init__(self, lines: list[OrderedDict[str, Place]], is_held_back: Filter | None) -> None:
        self._is_held_back = is_held_back
        starts = [iter(line.values()) for line in lines]
        self._heap = [entry for line in starts if (entry := self._next_of(line)) is not None]
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
        entry = next(line, None)
        if entry is None:
            return None
        place, request = entry
        is_held_back, adapter = self._is_held_back, request.adapter
        if is_held_back is not None and adapter is not None and is_held_back(place, adapter):
            return None
        return place, request, line
