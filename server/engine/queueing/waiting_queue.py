"""Decides in which order waiting requests may be admitted. Knows arrival order, adapters and tenants; knows no blocks.

This is the whole admission policy: the scheduler asks it who comes next and does the rest. Between tenants the one that
has been given least comes first (`fair_share`); within a tenant first come, first served, where a request whose adapter
is not on the device yet is passed over. Adapters are loaded by the same rule, counted in bytes. No step ever looks at
more than a few requests, however many wait.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping

from adapters_store.base.description import AdapterDigest
from adapters_store.tiers.entries import Owner
from server.engine.queueing.candidates import Starving, Walk
from server.engine.queueing.fair_share import FairShare, TenantAccount
from server.engine.queueing.tenant_queue import Filter, TenantQueue, TenantWalk
from server.engine.request import Request

_ByLoad = tuple[float, int, TenantQueue]


class FairAdmission:
    """The waiting queues of all tenants and their order.

    lookahead: how many distinct waiting adapters are brought to the device ahead of time.
    starvation_s: after this long without room for its adapter, a request holds back those behind it that use one.
    """

    def __init__(self, *, lookahead: int, starvation_s: float) -> None:
        self.shares = FairShare()
        self._lookahead = lookahead
        self._starvation_s = starvation_s
        self._queues: dict[str, TenantQueue] = {}  # of tenants that wait
        self._parked: set[str] = set()  # of those, who had no candidate when last looked at
        self._by_load: list[_ByLoad] = []  # of those, who wait for an adapter: the least loaded for first
        self._num_load_entries = 0
        self._load_time = 0.0  # what an idle tenant's load is lifted to
        self._wanted: dict[AdapterDigest, Owner] | None = None
        self._num_waiting = 0
        self._next_place = 0
        self._front_place = 0
        self._seen_activations = -1

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def num_arrivals(self) -> int:
        """Rises with each request that is new."""
        return self._next_place

    @property
    def num_tenants(self) -> int:
        return len(self._queues)

    def num_waiting_of(self, tenant: str) -> int:
        """How many requests of this tenant wait. Any thread may ask."""
        queue = self._queues.get(tenant)
        return 0 if queue is None else queue.account.num_waiting

    def adapters(self) -> list[AdapterDigest]:
        """Distinct adapters somebody waits for."""
        found = dict.fromkeys(digest for queue in self._queues.values() for digest in queue.lines)
        return [digest for digest in found if digest is not None]

    def push(self, request: Request) -> None:
        """To the back of its tenant's queue."""
        queue = self._entered(request)
        self._next_place += 1
        is_new_line = queue.push(self._next_place, request)
        if is_new_line:
            self._line_began(queue, request)

    def push_front(self, request: Request) -> None:
        """To the front of its tenant's queue: it was running already."""
        queue = self._entered(request)
        self._front_place -= 1
        is_new_line = request.adapter not in queue.lines
        queue.push_front(self._front_place, request)
        if is_new_line:
            self._line_began(queue, request)
        self._changed(queue)

    def remove(self, request: Request) -> None:
        """Out of the queue, wherever it stands."""
        queue = self._queues[request.tenant]
        if queue.remove(request) and request.adapter is not None:
            self._wanted = None
            if request.adapter not in queue.lines and queue.num_adapters == 0:
                self._drop_load(queue)
        self._num_waiting -= 1
        queue.account.num_waiting -= 1
        if not queue.account.num_waiting:
            del self._queues[request.tenant]
            self._parked.discard(request.tenant)

    def line(self, digest: AdapterDigest) -> list[Request]:
        """Everyone who waits for this adapter, in order of arrival."""
        places = [place for queue in self._queues.values() for place in queue.lines.get(digest, {}).values()]
        return [request for _, request in sorted(places, key=lambda place: place[0])]

    def wanted(self) -> Mapping[AdapterDigest, Owner]:
        """The adapters to have on the device next, the most urgent first, and for whom.

        Tenants take turns, whoever has had the fewest bytes loaded first: one with a thousand adapters gets one turn
        like one with a single adapter.
        """
        if self._wanted is None:
            self._wanted = {}
            for owner, digest in self._turns():
                self._wanted.setdefault(digest, owner)
                if len(self._wanted) == self._lookahead:
                    break
        return self._wanted

    def charge_load(self, owner: Owner, num_elements: int) -> None:
        """An adapter of this size is being brought to the device for this tenant."""
        account, queue = self.shares.account(owner.tenant), self._queues.get(owner.tenant)
        waits = queue is not None and queue.num_adapters > 0
        if queue is not None and waits:
            self._drop_load(queue)
        self._load_time = max(self._load_time, account.load)
        account.load += num_elements / owner.weight
        if queue is not None and waits:
            insort(self._by_load, _key(queue))
            self._wanted = None

    def starving(
        self, no_room_since: Mapping[AdapterDigest, float], over_share: Collection[AdapterDigest], now_s: float
    ) -> Starving | None:
        """Whom to hold back others for, if there is somebody. over_share: adapters denied for their own tenant."""
        if not no_room_since:
            return None
        for digest, owner in self.wanted().items():
            if now_s - no_room_since.get(digest, now_s) > self._starvation_s:
                return Starving(self._place(digest, owner), digest, owner.tenant if digest in over_share else None)
        return None

    def wanted_beside(self, starving: Starving | None) -> tuple[Mapping[AdapterDigest, Owner], int]:
        """What to bring to the device, and how many of these may take room.

        While somebody starves, only those may that are more urgent and stand before it: the others are held back, so
        what they got would lie there unused.
        """
        wanted = self.wanted()
        if starving is None or starving.tenant is not None:
            return wanted, len(wanted)
        before: dict[AdapterDigest, Owner] = {}
        for digest, owner in wanted.items():
            if digest == starving.adapter or self._place(digest, owner) < starving.place:
                before[digest] = owner
            if digest == starving.adapter:
                break
        return {**before, **wanted}, len(before)

    def walk(
        self,
        ready: Collection[AdapterDigest],
        activations: int,
        starving: Starving | None = None,
        crowding: Collection[str] = (),
    ) -> Walk:
        """Candidates in order. activations: changes whenever `ready` may have grown.

        crowding: tenants that may take no more of the device, because others wait for their share of it.
        """
        if activations != self._seen_activations:
            self._seen_activations = activations
            for tenant in self._parked:
                self.shares.offer(self._queues[tenant].account)
            self._parked.clear()
        return Walk(self.shares, self._open, ready, starving, crowding)

    def _open(
        self, account: TenantAccount, ready: Collection[AdapterDigest], is_held_back: Filter | None
    ) -> TenantWalk | None:
        """This tenant's candidates; None if it has none, and it is asked again when something comes."""
        walk = self._queues[account.tenant].candidates(ready, is_held_back)
        if walk is None:
            self._parked.add(account.tenant)
        return walk

    def _entered(self, request: Request) -> TenantQueue:
        queue = self._queues.get(request.tenant)
        if queue is None:
            account = self.shares.account(request.tenant)
            account.weight = request.weight
            self.shares.begin_waiting(account)
            queue = self._queues[request.tenant] = TenantQueue(account)
            account.num_waiting = 1
            self.shares.offer(account)
        else:
            queue.account.num_waiting += 1
        self._num_waiting += 1
        return queue

    def _line_began(self, queue: TenantQueue, request: Request) -> None:
        self._changed(queue)
        if request.adapter is not None and queue.num_adapters == 1:
            queue.account.load = max(queue.account.load, self._load_time)
            self._num_load_entries += 1
            queue.load_entry = self._num_load_entries
            insort(self._by_load, _key(queue))

    def _changed(self, queue: TenantQueue) -> None:
        """A line has come or has a new head: it may hold a candidate."""
        self._wanted = None
        if queue.account.tenant in self._parked:
            self._parked.remove(queue.account.tenant)
            self.shares.offer(queue.account)

    def _turns(self) -> Iterator[tuple[Owner, AdapterDigest]]:
        """One adapter for each tenant, then a second one for each that waits for more."""
        queues = [queue for _, _, queue in self._by_load[: self._lookahead]]
        num_turns = 0
        while queues:
            more = []
            for queue in queues:
                digests = [digest for _, digest in queue.heads[num_turns : num_turns + 2]]
                if digests and digests[0] is not None:
                    yield Owner(queue.account.tenant, queue.account.weight), digests[0]
                if len(digests) == 2:
                    more.append(queue)
            queues, num_turns = more, num_turns + 1

    def _place(self, digest: AdapterDigest, owner: Owner) -> int:
        return next(iter(self._queues[owner.tenant].lines[digest].values()))[0]

    def _drop_load(self, queue: TenantQueue) -> None:
        del self._by_load[bisect_left(self._by_load, _key(queue))]


def _key(queue: TenantQueue) -> _ByLoad:
    return queue.account.load, queue.load_entry, queue
