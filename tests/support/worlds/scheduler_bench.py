"""A scheduler over adapter memory that the test fills and empties, stepped by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import StoreError
from adapters_store.tiers.entries import AdapterSnapshot, Owner
from server.engine.request import Request, SamplingParams
from server.engine.schedule import Schedule, SchedulerSettings
from server.engine.scheduling.block_pool import BlockPool, KVCacheSettings
from server.engine.scheduling.scheduler import Scheduler
from support.worlds.adapter_memory import FakeClock


@dataclass
class FakeAdapters:
    """Adapters are ready when the test says so. doomed: deleted ones, which leave with their last user."""

    ready_digests: dict[AdapterDigest, int] = field(default_factory=dict)
    broken: dict[AdapterDigest, StoreError] = field(default_factory=dict)
    no_room_since: dict[AdapterDigest, float] = field(default_factory=dict)
    references: dict[AdapterDigest, int] = field(default_factory=dict)
    last_update: Mapping[AdapterDigest, Owner] = field(default_factory=dict)
    limit: int = 0
    over_share: set[AdapterDigest] = field(default_factory=set)
    over_share_tenants: set[str] = field(default_factory=set)
    doomed: set[AdapterDigest] = field(default_factory=set)
    loads: list[tuple[Owner, int]] = field(default_factory=list)

    @property
    def wanted(self) -> list[AdapterDigest]:
        return list(self.last_update)

    @property
    def owners(self) -> list[Owner]:
        return list(self.last_update.values())

    def poll(self) -> AdapterSnapshot:
        loads, self.loads = self.loads, []
        return self._snapshot(loads=loads)

    def update(self, wanted: Mapping[AdapterDigest, Owner], limit: int) -> AdapterSnapshot:
        self.last_update, self.limit = wanted, limit
        if not self.broken:
            return self._snapshot()
        return self._snapshot(failures={digest: self.broken[digest] for digest in wanted if digest in self.broken})

    def _snapshot(
        self, *, loads: Sequence[tuple[Owner, int]] = (), failures: Mapping[AdapterDigest, StoreError] | None = None
    ) -> AdapterSnapshot:
        return AdapterSnapshot(
            ready=self.ready_digests,
            num_activations=self._num_activations() if self.ready_digests else 0,
            loads=loads,
            failures=failures or {},
            no_room_since=self.no_room_since,
            over_share=self.over_share,
            over_share_tenants=self.over_share_tenants,
        )

    def _num_activations(self) -> int:
        return sum(self.ready_digests.values()) + len(self.ready_digests)  # a test adds adapters directly

    def acquire(self, digest: AdapterDigest) -> int | None:
        slot = self.ready_digests.get(digest)
        if slot is not None:
            self.references[digest] = self.references.get(digest, 0) + 1
        return slot

    def release(self, digest: AdapterDigest) -> None:
        self.references[digest] -= 1
        assert self.references[digest] >= 0
        if not self.references[digest] and digest in self.doomed:
            del self.ready_digests[digest]


@dataclass
class Bench:
    """A scheduler and its parts. step_s: how long a forward takes."""

    adapters: FakeAdapters
    pool: BlockPool
    clock: FakeClock
    scheduler: Scheduler
    step_s: Callable[[Schedule], float]
    num_requests: int = 0

    def add(
        self,
        num_prompt: int = 4,
        *,
        max_tokens: int = 8,
        adapter: AdapterDigest | None = None,
        tenant: str = "law",
        weight: float = 1.0,
        deadline_s: float | None = None,
    ) -> Request:
        prompt = [1000 * self.num_requests + index for index in range(num_prompt)]
        params = SamplingParams(max_tokens=max_tokens)
        request = Request(
            f"r{self.num_requests}", tenant, prompt, params, adapter, weight=weight, deadline_s=deadline_s
        )
        self.num_requests += 1
        self.scheduler.add(request)
        return request

    def running(self, tenant: str) -> list[Request]:
        return [request for request in self.scheduler.running if request.tenant == tenant]

    def step(self) -> list[tuple[str, int]]:
        """One step; (request id, tokens) of each row. Finishes requests that have all their tokens."""
        schedule = self.forward()
        return [] if schedule is None else [(row.request.id, row.num_tokens) for row in schedule.rows]

    def forward(self) -> Schedule | None:
        """The same; what ran."""
        schedule = self.scheduler.schedule()
        if schedule is not None:
            self.clock.advance(self.step_s(schedule))
            self.commit(schedule)
        return schedule

    def commit(self, schedule: Schedule) -> None:
        self.scheduler.commit(schedule, {row.request.id: 7 for row in schedule.rows if row.samples})
        for row in schedule.rows:
            if len(row.request.output_ids) >= row.request.params.max_tokens:
                self.scheduler.finish(row.request)


SMALL = SchedulerSettings(max_batch_tokens=16, max_running=8, watermark=0.0)


def make_bench(
    num_blocks: int = 64,
    *,
    block_size: int = 4,
    max_model_len: int = 256,
    step_s: Callable[[Schedule], float] = lambda schedule: 0.0,
    **changes: float,
) -> Bench:
    """`changes` to the settings SMALL."""
    adapters, clock = FakeAdapters(), FakeClock()
    pool = BlockPool(KVCacheSettings(num_blocks=num_blocks, block_size=block_size), "sha256:base")
    settings = replace(SMALL, **changes)  # type: ignore[arg-type]
    scheduler = Scheduler(settings, pool, adapters, max_model_len=max_model_len, clock=clock)
    return Bench(adapters, pool, clock, scheduler, step_s)
