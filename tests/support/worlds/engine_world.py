"""A whole engine without tensors, driven by one seed: arrivals, aborts, failures, deletions, a device too small.

The fake model is a chain: the state after a token is a function of the state before it, the token, the tenant and the
weights found in the adapter's slot. States live in fake KV blocks. So a request that reads a wrong block, a stale
block, a wrong slot or an overwritten arena computes other tokens than `expected_output`, which knows none of these. And
as attention reads all that comes before a token, a NaN anywhere there makes a NaN.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import BlobDamaged, NotFound
from adapters_store.packed.layout import PackedAdapter
from adapters_store.tiers.device_pool import DevicePool, DevicePoolSettings
from adapters_store.tiers.host_tier import HostTier, HostTierSettings
from adapters_store.tiers.stats import AdapterTiersSettings
from adapters_store.tiers.tiers import AdapterTiers
from server.engine.request import QueueFull, Request, SamplingParams, Status
from server.engine.schedule import Schedule, ScheduledRow, SchedulerSettings
from server.engine.scheduling.block_pool import BlockPool, KVCacheSettings
from server.engine.scheduling.scheduler import Scheduler
from support.worlds.adapter_memory import FakeClock, FakeDevice, digest_of, packed
from support.worlds.block_claims import check_blocks
from support.worlds.fake_chain import EMPTY, NAN, TENANTS, expected_output, first_state, is_whole, next_state
from support.worlds.world_drafts import WorldDrafts, right_ones
from support.worlds.world_grammars import WorldConstraints, check_whole, drawn


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """How large the world is and how often things happen (per step)."""

    num_adapters: int = 12
    num_blocks: int = 28
    pool_elements: int = 64
    max_slots: int = 4
    host_elements: int = 110
    max_running: int = 6
    max_batch_tokens: int = 24
    prefill_chunk: int | None = None
    max_waiting: int = 20
    arrivals: float = 0.22
    aborts: float = 0.01
    deletions: float = 0.01
    load_failures: float = 0.03
    numeric_failures: float = 0.001
    step_s: float = 0.05
    starvation_s: float = 2.0
    hold_s: float = 1.0
    deadlines: float = 0.0  # share of requests that have one
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of TENANTS
    traffic: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of TENANTS
    has_cycler: bool = False  # the first tenant goes through all adapters in turn, the others keep to one each
    check_every: int = 1  # steps
    rope_switches: tuple[int, ...] = ()
    constrained: float = 0.0  # share of requests that follow a grammar
    drafts: int = 0  # most tokens that are guessed in a forward
    sizes: tuple[int, ...] = ()  # elements of the first adapters; the others are drawn


@dataclass
class World:
    """One engine, its clients and its bad luck."""

    seed: int
    settings: WorldSettings = field(default_factory=WorldSettings)

    def __post_init__(self) -> None:
        sizes = self.settings
        self.random = random.Random(self.seed)
        self.constraints = WorldConstraints(self.seed, sizes.constrained)
        self.clock = FakeClock()
        names = [f"a{index}" for index in range(sizes.num_adapters)]
        drawn = [self.random.randint(3, 40) for _ in names]
        self.adapters = {
            digest_of(name): packed(name, size)
            for name, size in zip(names, [*sizes.sizes, *drawn[len(sizes.sizes) :]], strict=True)
        }
        self.adapters[digest_of("giant")] = packed("giant", sizes.pool_elements + 1)
        self.tags = {digest: 1000 + index for index, digest in enumerate(self.adapters)}
        self.tags[digest_of("a0")] = NAN  # an adapter whose numbers are not finite
        self.damaged = digest_of("a1")
        blocks = KVCacheSettings(num_blocks=sizes.num_blocks, block_size=4, rope_switches=sizes.rope_switches)
        self.pool = BlockPool(blocks, "sha256:base")
        self.host = HostTier(HostTierSettings(max_bytes=4 * sizes.host_elements), self._load, clock=self.clock)
        pool_settings = DevicePoolSettings(
            capacity_elements=sizes.pool_elements, max_slots=sizes.max_slots, alignment_elements=4, hold_s=sizes.hold_s
        )
        self.device_pool = DevicePool(pool_settings, self.clock)
        self.device = self._make_device()
        self.tiers = AdapterTiers(
            self.host,
            self.device_pool,
            self.device,
            settings=AdapterTiersSettings(max_copies=2, recheck_s=4 * sizes.step_s),
            clock=self.clock,
        )
        self.scheduler = Scheduler(
            self._scheduler_settings(), self.pool, self.tiers, max_model_len=64, clock=self.clock
        )
        self.drafts = WorldDrafts(sizes.drafts, self.pool, self.tags, self.seed, sizes.rope_switches)
        self.scheduler.lookup = self.drafts
        self.kv = [[EMPTY] * 4 for _ in range(sizes.num_blocks)]
        self.injected: set[tuple[str, AdapterDigest | None]] = set()  # whose numbers have been spoilt once
        self.ends: dict[str, str] = {}
        self.alive: dict[str, tuple[Request, int]] = {}  # with the step of arrival
        self.outcomes: Counter[str] = Counter()
        self.num_preemptions = 0
        self.num_starving_steps = 0
        self.num_steps = 0
        self.num_requests = 0
        self._were_running: set[str] = set()
        self.num_cycled = 0
        self.longest_waits = dict.fromkeys(TENANTS, 0)

    def _make_device(self) -> FakeDevice:
        return FakeDevice(self.settings.pool_elements, self.tags.__getitem__, self._copy_ticks)

    def _copy_ticks(self, num_elements: int) -> int:
        return self.random.randint(0, 3)

    def _scheduler_settings(self) -> SchedulerSettings:
        sizes = self.settings
        return SchedulerSettings(
            max_batch_tokens=sizes.max_batch_tokens,
            max_running=sizes.max_running,
            max_waiting=sizes.max_waiting,
            prefill_chunk=sizes.prefill_chunk,
            lookahead=6,
            starvation_s=sizes.starvation_s,
        )

    @property
    def longest_wait(self) -> int:
        """Steps for which anybody has waited to run for the first time."""
        return max(self.longest_waits.values())

    def step(self, *, arrivals: bool = True) -> None:
        """One engine step and everything that happens around it."""
        self._pass_time(arrivals=arrivals)
        self._step()  # apart: the traceback of a failed load keeps the frames above it, and what these name

    def _step(self) -> None:
        schedule = self.scheduler.schedule()
        self._count_starving()
        for request, error in self.scheduler.take_failed():
            self._end(request, error.code)
        for request in self.scheduler.take_late():
            assert request.deadline_s is not None
            assert request.deadline_s <= self.clock.now_s, f"{request.id} was dropped before its time"
            self._end(request, "late")
        for block_id in self.pool.take_blocks_to_zero():
            self.kv[block_id] = [EMPTY] * 4
        self._check_schedule(schedule, self.scheduler.running)
        if self.num_steps % self.settings.check_every == 0:
            self.check()
        if schedule is not None:
            self._run(schedule)

    def _pass_time(self, *, arrivals: bool) -> None:
        self.num_steps += 1
        self.clock.advance(self.settings.step_s)
        if arrivals:
            self._arrive()
        self._disturb()
        for _ in range(self.random.randrange(3)):
            self.host.load_next()
        self.device.tick()

    def drain(self) -> None:
        """No more arrivals until everybody has an answer."""
        limit = self.num_steps + 20_000
        while self.alive:  # also those that ended in the last step and are not reported yet
            assert self.num_steps < limit, f"never answered: {list(self.alive)}"
            self.step(arrivals=False)

    def _load(self, digest: AdapterDigest) -> PackedAdapter:
        if digest == self.damaged or self.random.random() < self.settings.load_failures:
            raise BlobDamaged("blob_damaged", f"{digest} is damaged")
        return self.adapters[digest]

    def add(self, request: Request) -> None:
        """A client's request, answered at once if the queue is full."""
        self.num_requests += 1
        request.weight = self.settings.weights[TENANTS.index(request.tenant)]
        if self.settings.deadlines and self.random.random() < self.settings.deadlines:
            request.deadline_s = self.clock.now_s + self.random.uniform(0.0, 8.0)
        try:
            self.scheduler.add(request)
        except QueueFull:
            self.ends[request.id] = "queue_full"
            self.outcomes["queue_full"] += 1
        else:
            self.alive[request.id] = (request, self.num_steps)

    def _arrive(self) -> None:
        if self.random.random() >= self.settings.arrivals:
            return
        digests = list(self.adapters)
        # Skewed, with the last adapters rare; base-only now and then.
        index = min(int(self.random.expovariate(0.3)), len(digests) - 1)
        adapter = None if self.random.random() < 0.15 else digests[index]
        tenant = self._tenant()
        if self.settings.has_cycler:
            adapter = self._habit(tenant)
        prefix = [self.random.randrange(2)] * self.random.choice((0, 4, 8, 13))
        prompt = prefix + [self.random.randrange(90) for _ in range(self.random.randint(1, 14))]
        params = SamplingParams(
            max_tokens=self.random.randint(1, 20), prompt_logprobs=0 if self.random.random() < 0.05 else None
        )
        for _ in range(self.random.choice((1, 1, 1, 3))):  # sometimes n choices of one call
            constraint = self.constraints.draw()
            self.add(Request(f"r{self.num_requests}", tenant, list(prompt), params, adapter, constraint=constraint))

    def _tenant(self) -> str:
        if self.settings.traffic == (1.0, 1.0, 1.0):
            return self.random.choice(TENANTS)
        return self.random.choices(TENANTS, self.settings.traffic)[0]

    def _habit(self, tenant: str) -> AdapterDigest:
        if tenant == TENANTS[0]:
            self.num_cycled += 1
        index = self.num_cycled if tenant == TENANTS[0] else TENANTS.index(tenant)
        return digest_of(f"a{2 + index % (self.settings.num_adapters - 2)}")  # a0 is not finite, a1 damaged

    def _disturb(self) -> None:
        if self.alive and self.random.random() < self.settings.aborts:
            self._abort(self.random.choice(list(self.alive)))
        if self.random.random() < self.settings.deletions:
            digest = self.random.choice(list(self.adapters))
            if self.random.random() < 0.5:
                self.tiers.forget(digest)  # the same content may be uploaded again, so it can be loaded again
                self.scheduler.fail_waiting(digest, NotFound("adapter_deleted", f"{digest} was deleted"))
                self.pool.drop_adapter(digest)
            else:
                self.tiers.unpin(digest)

    def _abort(self, request_id: str) -> None:
        request = self.scheduler.abort(request_id)
        assert request is not None
        self._end(request, "abort")
        assert self.scheduler.abort(request_id) is None

    def _run(self, schedule: Schedule) -> None:
        tokens: dict[str, int] = {}
        followers: dict[str, list[int]] = {}
        for row in schedule.rows.copy():
            states = self._forward(row)
            state = states[0]
            if row.draft and state == NAN:
                schedule.drop(row.request)
            elif row.draft:
                tokens[row.request.id], *followers[row.request.id] = right_ones(row.draft, states)
            elif row.samples and state == NAN:
                self.scheduler.discard(row.request)
                self._check_blame(row.request)
                self._end(row.request, "numerics")
            elif row.samples:
                tokens[row.request.id] = drawn(state, row.request.constraint, row.request.output_ids)
        if self.random.random() < self.settings.aborts:  # a client hangs up during the forward
            self._abort_one_of(schedule)
        self.scheduler.commit(schedule, tokens)
        for row in schedule.rows:
            request = row.request
            for token in followers.get(request.id, ()):
                if request.status is Status.RUNNING:
                    self.scheduler.accept(request, token)
                    self.drafts.num_right += 1
            if request.status is Status.RUNNING and (
                is_whole(request.constraint, request.output_ids) or len(request.output_ids) == request.params.max_tokens
            ):
                self._check_answer(request)
                self.scheduler.finish(request)
                self.scheduler.finish(request)
                self._end(request, "finished")

    def _abort_one_of(self, schedule: Schedule) -> None:
        request = self.random.choice(schedule.rows).request
        if request.id in self.alive:
            self._abort(request.id)

    def _forward(self, row: ScheduledRow) -> list[int]:
        """The states behind the row's last token of the request, and behind each token of its draft."""
        request, states = row.request, []
        weight = 7 if request.slot is None else self.device.read(request.slot)
        state = self.state_before(request, row.start, request.block_ids)
        if self.random.random() < self.settings.numeric_failures:
            self.injected.add((request.tenant, request.adapter))
            weight = NAN
        tokens = [*request.tokens(row.start, row.start + row.num_tokens - len(row.draft)), *row.draft]
        for position, token in enumerate(tokens, start=row.start):
            state = next_state(state, token, weight)
            self.kv[request.block_ids[position // 4]][position % 4] = state
            states.append(state)
        end = max(request.num_written_tokens, row.start + row.num_tokens)
        if end % 4:
            rest = self.kv[request.block_ids[end // 4]][end % 4 :]
            assert NAN not in rest, f"{request.id} was given a block with poison in it"
        return states[len(tokens) - len(row.draft) - 1 :]

    def state_before(self, request: Request, start: int, blocks: list[int]) -> int:
        """What a row at position `start` goes on from, having read all positions before it."""
        if start == 0:
            return first_state(request, request.num_tokens, self.settings.rope_switches)
        num_full, rest = divmod(start, 4)
        last = self.kv[blocks[num_full]][:rest] if rest else self.kv[blocks[num_full - 1]]
        is_spoilt = NAN in last or any(NAN in self.kv[block_id] for block_id in blocks[:num_full])
        return NAN if is_spoilt else last[-1]

    def _cell(self, request: Request, position: int) -> int:
        return self.kv[request.block_ids[position // 4]][position % 4]

    def _check_answer(self, request: Request) -> None:
        weight = 7 if request.adapter is None else self.tags[request.adapter]
        answer = expected_output(request, weight, self.settings.rope_switches)
        assert request.output_ids == answer, f"{request.id} answered wrongly"
        self.check_grammar(request)
        state = first_state(request, request.num_computed_tokens, self.settings.rope_switches)
        for position in range(request.num_computed_tokens):
            state = next_state(state, request.token_at(position), weight)
            assert self._cell(request, position) == state, f"{request.id}: position {position} was overwritten"

    def check_grammar(self, request: Request) -> None:
        check_whole(request.constraint, request.output_ids)
        self.constraints.num_whole += request.constraint is not None and request.constraint.is_complete

    def _check_blame(self, request: Request) -> None:
        is_own_fault = request.adapter is not None and self.tags[request.adapter] == NAN
        assert is_own_fault or (request.tenant, request.adapter) in self.injected, f"{request.id} caught another's NaN"

    def _end(self, request: Request, outcome: str) -> None:
        assert request.id not in self.ends, f"{request.id} ended twice: {self.ends[request.id]} and {outcome}"
        assert request.status is Status.FINISHED
        assert not request.block_ids
        self.ends[request.id] = outcome
        self.outcomes[outcome] += 1
        self.num_preemptions += request.num_preemptions
        del self.alive[request.id]

    def _count_starving(self) -> None:
        limit_s = self.clock.now_s - self.scheduler.settings.starvation_s
        self.num_starving_steps += any(since_s < limit_s for since_s in self.tiers._no_room_since.values())

    def check(self) -> None:
        """Everything that must hold between schedule() and the forward."""
        running = self.scheduler.running
        self._check_blocks(running)
        self._check_device(running)
        self._check_host()
        num_unreported = len(self.scheduler._failed)  # they waited for an adapter quarantined just now
        assert len(self.alive) == self.scheduler.num_waiting + self.scheduler.num_running + num_unreported
        for request, arrival in self.alive.values():
            if request.first_scheduled_s is None:
                wait = self.num_steps - arrival
                self.longest_waits[request.tenant] = max(self.longest_waits[request.tenant], wait)

    def _check_blocks(self, running: Sequence[Request]) -> None:
        check_blocks(self.pool, (request.block_ids for request in running))
        owner: dict[int, tuple[str, AdapterDigest | None]] = {}
        for request in running:
            who = (request.tenant, request.adapter)
            for block_id in request.block_ids:
                assert owner.setdefault(block_id, who) == who, f"block {block_id} is shared across {who}"

    def _check_device(self, running: Sequence[Request]) -> None:
        users = Counter(request.adapter for request in running if request.adapter is not None)
        slots = set()
        for entry in self.device_pool.entries():
            slots.add(entry.slot)
            assert entry.ref_count == users.pop(entry.digest, 0), f"{entry.digest}: references differ from users"
            assert self.device.table[entry.slot] == (entry.offset, entry.num_elements, entry.digest)
        assert not users, f"in use but not on the device: {users}"
        places = sorted(
            (entry.offset, entry.offset + -(-entry.num_elements // 4) * 4) for entry in self.device_pool.entries()
        )
        ends = [0, *(end for _, end in places)]
        assert all(start >= end for (start, _), end in zip(places, ends, strict=False)), f"overlap: {places}"
        assert ends[-1] <= self.device_pool.capacity_elements
        used = sum(end - start for start, end in places)
        assert used + self.device_pool.num_free_elements == self.device_pool.capacity_elements
        assert slots == self.device.table.keys()
        for request in running:
            if request.slot is not None:
                assert self.device.table[request.slot][2] == request.adapter, f"{request.id} reads another's slot"

    def _check_host(self) -> None:
        stats = self.host.stats()
        assert 0 <= stats.num_bytes <= self.host.settings.max_bytes

    def _check_schedule(self, schedule: Schedule | None, running: Sequence[Request]) -> None:
        rows = [] if schedule is None else schedule.rows
        scheduled = {row.request.id for row in rows}
        assert len(scheduled) == len(rows), "a request is in a forward twice"
        assert sum(row.num_tokens for row in rows) <= self.settings.max_batch_tokens
        assert len(running) <= self.settings.max_running
        if schedule is not None:
            assert all(row.num_tokens == 1 for row in rows[: schedule.num_decodes])
            assert schedule.num_tokens == sum(row.num_tokens for row in rows)
        for row in rows:
            assert row.request.status is Status.RUNNING
            assert row.start == row.request.num_computed_tokens
            assert row.request.deadline_s is None or row.request.deadline_s > self.clock.now_s, "late, and yet computed"
            assert len(row.request.block_ids) * 4 >= row.start + row.num_tokens
        for request in running:
            if request.num_tokens - request.num_computed_tokens == 1 and request.id not in scheduled:
                self._check_left_out(request, schedule)
        self._were_running = {request.id for request in running}

    def _check_left_out(self, request: Request, schedule: Schedule | None) -> None:
        """It decodes and got no token: another's prompt goes before, and its tenant decodes in other rows, unless this
        is the step that admitted it."""
        assert schedule is not None, f"{request.id} decodes and nothing runs"
        decodes, chunks = schedule.rows[: schedule.num_decodes], schedule.rows[schedule.num_decodes :]
        assert any(row.request.tenant != request.tenant for row in chunks), f"{request.id} was skipped for nothing"
        if request.id in self._were_running:
            assert any(row.request.tenant == request.tenant for row in decodes), f"{request.tenant} stands still"

    def check_at_rest(self) -> None:
        """Everybody has been answered: nothing is held any more."""
        assert self.pool.num_free == self.pool.num_blocks
        assert all(entry.ref_count == 0 for entry in self.device_pool.entries())
        assert len(self.ends) == self.num_requests
        gc.collect()
        assert not self.constraints.living, "a matcher outlived its request"
