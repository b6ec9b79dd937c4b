"""Decides in which order waiting requests may be admitted. Knows arrival order, adapters and tenants; knows no blocks.

The scheduler takes candidates from here and does the rest. Between tenants the least served comes first (`fair_share`).
Within a tenant it is first come, first served, except that a request whose adapter is not on the device yet is passed
over. Adapters are loaded by the same rule, counted in bytes. No step looks at more than a few requests, however many
wait.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping

from adapters_store.base.description import AdapterDigest
from adapters_store.tiers.entries import Owner
from server.engine.queueing.candidates import Candidates, Starving
from server.engine.queueing.fair_share import FairShare, TenantAccount
from server.engine.queueing.tenant_queue import IsHeldBack, TenantCandidates, TenantQueue
from server.engine.request import Request

_ByLoad = tuple[float, int, TenantQueue]


class WaitingQueue:
    """The waiting requests of all tenants and their order.

    lookahead: how many distinct waiting adapters are brought to the device ahead of time.
    starvation_s: after this long without room for its adapter, a request holds back later ones that use another.
    """

    def __init__(self, *, lookahead: int, starvation_s: float) -> None:
        self.shares = FairShare()
        self._lookahead = lookahead
        self._starvation_s = starvation_s
        self._queues: dict[str, TenantQueue] = {}  # of tenants that wait
        self._parked: set[str] = set()  # of those, tenants that had no candidate when last looked at
        self._by_load: list[_ByLoad] = []  # of those, tenants that wait for an adapter: the fewest loaded bytes first
        self._num_load_entries = 0
        self._load_time = 0.0  # what an idle tenant's load is lifted to
        self._wanted: dict[AdapterDigest, Owner] | None = None
        self._num_waiting = 0
        self._next_position = 0
        self._front_position = 0
        self._seen_activations = -1

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def num_arrivals(self) -> int:
        """Rises with each new request."""
        return self._next_position

    @property
    def num_tenants(self) -> int:
        return len(self._queues)

    def num_waiting_of(self, tenant: str) -> int:
        """How many requests of this tenant wait. Any thread may ask."""
        queue = self._queues.get(tenant)
        return 0 if queue is None else queue.account.num_waiting

    def adapters(self) -> list[AdapterDigest]:
        """Distinct adapters of waiting requests."""
        found = dict.fromkeys(digest for queue in self._queues.values() for digest in queue.by_adapter)
        return [digest for digest in found if digest is not None]

    def push(self, request: Request) -> None:
        """Add to the back of its tenant's queue."""
        queue = self._enqueued(request)
        self.shares.set_weight(queue.account, request.weight)
        self._next_position += 1
        if queue.push(self._next_position, request):
            self._new_adapter(queue, request)

    def push_front(self, request: Request) -> None:
        """Add to the front of its tenant's queue: it was running already."""
        queue = self._enqueued(request)
        self._front_position -= 1
        is_new = request.adapter not in queue.by_adapter
        queue.push_front(self._front_position, request)
        if is_new:
            self._new_adapter(queue, request)
        self._new_head(queue)

    def remove(self, request: Request) -> None:
        """Remove it from any position."""
        queue = self._queues[request.tenant]
        if queue.remove(request) and request.adapter is not None:
            self._wanted = None
            if request.adapter not in queue.by_adapter and queue.num_adapters == 0:
                self._drop_load(queue)
        self._num_waiting -= 1
        queue.account.num_waiting -= 1
        if not queue.account.num_waiting:
            del self._queues[request.tenant]
            self._parked.discard(request.tenant)

    def waiting_for(self, digest: AdapterDigest) -> list[Request]:
        """All requests for this adapter, in order of arrival."""
        entries = [entry for queue in self._queues.values() for entry in queue.by_adapter.get(digest, {}).values()]
        return [request for _, request in sorted(entries, key=lambda entry: entry[0])]

    def wanted(self) -> Mapping[AdapterDigest, Owner]:
        """The adapters to have on the device next, the most urgent first, each with the tenant it is loaded for.

        Tenants alternate, the one with the fewest loaded bytes first. A tenant with a thousand adapters gets as many
        loads as one with a single adapter.
        """
        if self._wanted is None:
            self._wanted = {}
            for owner, digest in self._round_robin():
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
        """The starving request the others must yield to, if any. over_share: adapters denied for their own tenant."""
        if not no_room_since:
            return None
        for digest, owner in self.wanted().items():
            if now_s - no_room_since.get(digest, now_s) > self._starvation_s:
                return Starving(self._position(digest, owner), digest, owner.tenant if digest in over_share else None)
        return None

    def wanted_while(self, starving: Starving | None) -> tuple[Mapping[AdapterDigest, Owner], int]:
        """The adapters to bring to the device, and how many of these may take room.

        While a request starves, only adapters of earlier, more urgent requests may take room. The other requests are
        held back, so their adapters would occupy memory unused.
        """
        wanted = self.wanted()
        if starving is None or starving.tenant is not None:
            return wanted, len(wanted)
        before: dict[AdapterDigest, Owner] = {}
        for digest, owner in wanted.items():
            if digest == starving.adapter or self._position(digest, owner) < starving.position:
                before[digest] = owner
            if digest == starving.adapter:
                break
        return {**before, **wanted}, len(before)

    def candidates(
        self,
        ready: Collection[AdapterDigest],
        activations: int,
        starving: Starving | None = None,
        over_share_tenants: Collection[str] = (),
    ) -> Candidates:
        """Requests in the order they may be admitted. activations: changes whenever `ready` may have grown.

        over_share_tenants: may take no more of the device, because others wait for their share of it.
        """
        if activations != self._seen_activations:
            self._seen_activations = activations
            for tenant in self._parked:
                self.shares.offer(self._queues[tenant].account)
            self._parked.clear()
        return Candidates(self.shares, self._open, ready, starving, over_share_tenants)

    def _open(
        self, account: TenantAccount, ready: Collection[AdapterDigest], is_held_back: IsHeldBack | None
    ) -> TenantCandidates | None:
        """This tenant's candidates. A tenant without one is parked until a request or an adapter arrives."""
        candidates = self._queues[account.tenant].candidates(ready, is_held_back)
        if candidates is None:
            self._parked.add(account.tenant)
        return candidates

    def _enqueued(self, request: Request) -> TenantQueue:
        queue = self._queues.get(request.tenant)
        if queue is None:
            account = self.shares.account(request.tenant)
            self.shares.begin_waiting(account)
            queue = self._queues[request.tenant] = TenantQueue(account)
            account.num_waiting = 1
            self.shares.offer(account)
        else:
            queue.account.num_waiting += 1
        self._num_waiting += 1
        return queue

    def _new_adapter(self, queue: TenantQueue, request: Request) -> None:
        self._new_head(queue)
        if request.adapter is not None and queue.num_adapters == 1:
            queue.account.load = max(queue.account.load, self._load_time)
            self._num_load_entries += 1
            queue.load_entry = self._num_load_entries
            insort(self._by_load, _key(queue))

    def _new_head(self, queue: TenantQueue) -> None:
        """The tenant may have a candidate again."""
        self._wanted = None
        if queue.account.tenant in self._parked:
            self._parked.remove(queue.account.tenant)
            self.shares.offer(queue.account)

    def _round_robin(self) -> Iterator[tuple[Owner, AdapterDigest]]:
        """One adapter for each tenant, then a second one for each that waits for more."""
        queues = [queue for _, _, queue in self._by_load[: self._lookahead]]
        num_rounds = 0
        while queues:
            more = []
            for queue in queues:
                digests = [digest for _, digest in queue.heads[num_rounds : num_rounds + 2]]
                if digests and digests[0] is not None:
                    yield Owner(queue.account.tenant, queue.account.weight), digests[0]
                if len(digests) == 2:
                    more.append(queue)
            queues, num_rounds = more, num_rounds + 1

    def _position(self, digest: AdapterDigest, owner: Owner) -> int:
        return self._queues[owner.tenant].first_position(digest)

    def _drop_load(self, queue: TenantQueue) -> None:
        del self._by_load[bisect_left(self._by_load, _key(queue))]


def _key(queue: TenantQueue) -> _ByLoad:
    return queue.account.load, queue.load_entry, queue
