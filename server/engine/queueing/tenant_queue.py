"""One tenant's waiting requests, in order: a queue for each adapter. Knows arrival order and adapters; knows no other
tenant.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from heapq import heapify, heappop, heapreplace

from adapters_store.base.description import AdapterDigest
from server.engine.queueing.fair_share import TenantAccount
from server.engine.request import Request

Entry = tuple[int, Request]  # position in the queue (smaller is earlier), and the request
Head = tuple[int, AdapterDigest | None]
IsHeldBack = Callable[[int, AdapterDigest], bool]  # takes position and adapter


def _position_of(head: Head) -> int:
    return head[0]


class TenantQueue:
    """load_entry: breaks ties of `account.load`, first come, first served."""

    def __init__(self, account: TenantAccount) -> None:
        self.account = account
        self.by_adapter: dict[AdapterDigest | None, OrderedDict[str, Entry]] = {}
        self.heads: list[Head] = []  # first position of each adapter's queue, in order
        self.load_entry = 0

    @property
    def num_adapters(self) -> int:
        return len(self.by_adapter) - (None in self.by_adapter)

    def push(self, position: int, request: Request) -> bool:
        """Add to the back; returns whether it is the first request for its adapter."""
        own = self.by_adapter.get(request.adapter)
        is_new = own is None
        if own is None:
            own = self.by_adapter[request.adapter] = OrderedDict()
            self.heads.append((position, request.adapter))
        own[request.id] = (position, request)
        return is_new

    def push_front(self, position: int, request: Request) -> None:
        """Add to the front, at a position before all others."""
        own = self.by_adapter.setdefault(request.adapter, OrderedDict())
        if own:
            self._drop_head(own)
        own[request.id] = (position, request)
        own.move_to_end(request.id, last=False)
        self.heads.insert(0, (position, request.adapter))

    def remove(self, request: Request) -> bool:
        """Remove it from any position; returns whether a head has changed."""
        own = self.by_adapter[request.adapter]
        if next(iter(own)) != request.id:
            del own[request.id]
            return False
        self._drop_head(own)
        del own[request.id]
        if own:
            insort(self.heads, (next(iter(own.values()))[0], request.adapter), key=_position_of)
        else:
            del self.by_adapter[request.adapter]
        return True

    def first_position(self, adapter: AdapterDigest) -> int:
        """Of the requests for this adapter."""
        return next(iter(self.by_adapter[adapter].values()))[0]

    def candidates(self, ready: Collection[AdapterDigest], is_held_back: IsHeldBack | None) -> TenantCandidates | None:
        """Requests of the base model and those whose adapter is ready, in order; None if there are none."""
        if len(self.by_adapter) <= len(ready) + 1:
            queues = [own for digest, own in self.by_adapter.items() if digest is None or digest in ready]
        else:
            queues = [self.by_adapter[digest] for digest in (None, *ready) if digest in self.by_adapter]
        return TenantCandidates(queues, is_held_back) if queues else None

    def _drop_head(self, own: OrderedDict[str, Entry]) -> None:
        position = next(iter(own.values()))[0]
        del self.heads[bisect_left(self.heads, position, key=_position_of)]


class TenantCandidates:
    """One tenant's requests in the order they may be admitted. The queue must not change meanwhile."""

    def __init__(self, queues: list[OrderedDict[str, Entry]], is_held_back: IsHeldBack | None) -> None:
        self._is_held_back = is_held_back
        starts = [iter(own.values()) for own in queues]
        self._heap = [entry for own in starts if (entry := self._next_of(own)) is not None]
        heapify(self._heap)

    @property
    def current(self) -> Request | None:
        """The next request; None at the end."""
        return self._heap[0][1] if self._heap else None

    def advance(self) -> None:
        """Done with the current request; the next one for its adapter becomes a candidate."""
        entry = self._next_of(self._heap[0][2])
        if entry is None:
            heappop(self._heap)
        else:
            heapreplace(self._heap, entry)

    def _next_of(self, own: Iterator[Entry]) -> tuple[int, Request, Iterator[Entry]] | None:
        entry = next(own, None)
        if entry is None:
            return None
        position, request = entry
        is_held_back, adapter = self._is_held_back, request.adapter
        if is_held_back is not None and adapter is not None and is_held_back(position, adapter):
            return None
        return position, request, own
