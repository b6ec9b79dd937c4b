"""Decides which requests run next, and on which tokens. Knows tokens, blocks and adapter references; knows nothing of
tensors, text or HTTP. Which requests start is `admission`'s decision, which request owns a block `block_pool`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import StoreError
from adapters_store.tiers.entries import AdapterSnapshot
from adapters_store.tiers.tiers import AdapterTiers
from server.engine.queueing.candidates import Starving
from server.engine.queueing.fair_share import OUTPUT_COST
from server.engine.queueing.waiting_queue import WaitingQueue
from server.engine.request import Request, Status
from server.engine.schedule import Schedule, ScheduledRow, SchedulerSettings
from server.engine.scheduling.admission import Admission
from server.engine.scheduling.block_pool import BlockPool
from server.engine.scheduling.chunked_prefill import ChunkedPrefill
from server.engine.scheduling.flood_control import FloodControl
from server.engine.scheduling.limits import Deadlines, RequestLimits
from server.engine.scheduling.overlap import Overlap
from server.engine.scheduling.preemption import RunningSlots
from server.engine.scheduling.prompt_lookup import PromptLookup


class Scheduler:
    """Continuous batching with chunked prefill and preemption by recompute. One engine thread owns it."""

    def __init__(
        self,
        settings: SchedulerSettings,
        pool: BlockPool,
        adapters: AdapterTiers,
        *,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.pool = pool
        self._adapters = adapters
        self._clock = clock
        self.waiting = WaitingQueue(lookahead=settings.lookahead, starvation_s=settings.starvation_s)
        kv_tokens = pool.num_blocks * pool.block_size
        self.limits = RequestLimits(settings, self.waiting, max_model_len=max_model_len, kv_tokens=kv_tokens)
        self.shares = self.waiting.shares
        self._slots = RunningSlots(settings, self.shares)
        self._flood = FloodControl(settings, self.shares, self._slots)
        self._prefill = ChunkedPrefill(settings, self.shares, self._flood)
        self._admission = Admission(
            settings, pool, adapters, self.waiting, slots=self._slots, flood=self._flood, prefill=self._prefill
        )
        self.running: Sequence[Request] = self._admission.running  # in order of admission
        self._deadlines = Deadlines()
        self._requests: dict[str, Request] = {}
        self._failed: list[tuple[Request, StoreError]] = []
        self._late: list[Request] = []
        self._memory = AdapterSnapshot()
        self._starving: Starving | None = None
        self._overlap = Overlap(pool)
        self.lookup = PromptLookup(settings.draft_tokens, pool)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    def running_adapters(self) -> list[AdapterDigest]:
        """Distinct adapters of running requests."""
        return list(dict.fromkeys(request.adapter for request in self.running if request.adapter is not None))

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest if it can never fit, QueueFull if too many wait."""
        assert request.id not in self._requests, f"{request.id} added twice"
        assert request.status is Status.WAITING, f"{request.id} is over already"
        self.limits.check_fits(request)
        self.limits.check_queue(request.tenant)
        self._requests[request.id] = request
        self.waiting.push(request)
        if request.deadline_s is not None:
            self._deadlines.watch(request.id, request.deadline_s)
            self._deadlines.drop_ended(self._requests)

    def schedule(self) -> Schedule | None:
        """The next forward, or None if nothing can run now. Running decodes first, then prefills, then the queue."""
        now_s = self.before_step()
        self._flood.begin_step(now_s)
        schedule = self._decode()
        held_up = self._prefill.continue_prefills(schedule, self.running)
        if self.waiting and self._admission.is_possible(self._memory.num_activations):
            self._admission.admit(schedule, self._memory, self._starving, now_s)
        for request in held_up:
            if request.status is Status.RUNNING:
                self._prefill.add(schedule, request)
        self._flood.trim(schedule)
        if schedule.num_tokens <= self.lookup.most:
            self.lookup.add_drafts(schedule)
        self._overlap.note_schedule(self._state())
        return _launched(schedule)

    def before_step(self) -> float:
        """The first part of schedule(), and all of it for a step whose forward is scheduled already: end late requests,
        bring wanted adapters to the device, and charge tenants for those that have arrived. Returns the time."""
        now_s, memory = self._clock(), self._adapters.poll()
        for request_id in self._deadlines.take_late(now_s):
            if (request := self.abort(request_id)) is not None:
                self._late.append(request)
        for owner, num_elements in memory.loads:
            self.waiting.charge_load(owner, num_elements)
        self._starving = self.waiting.starving(memory.no_room_since, memory.over_share, now_s)
        self._memory = self._adapters.update(*self.waiting.wanted_while(self._starving))
        for digest, error in self._memory.failures.items():
            self.fail_waiting(digest, error)
        return now_s

    def schedule_next(self, schedule: Schedule) -> Schedule | None:
        """The forward after `schedule`, which is under way and whose rows are current. None if it depends on the tokens
        of `schedule`: then schedule() must choose it.

        If a request ends all the same, its extra row will not be current.
        """
        if len(schedule.rows) < len(self.running) or (self.waiting and self._starving is not None):
            return None
        ahead = self._overlap.after(schedule, self._state(), has_waiting=bool(self.waiting))
        return None if ahead is None else _launched(ahead)

    def commit(self, schedule: Schedule, tokens: Mapping[str, int]) -> None:
        """The forward ran. tokens: request id -> sampled token, one for each row that samples. All rows are current.

        Rows of requests that finished meanwhile are skipped. A row may lack its token only if the request finishes
        before the next schedule().
        """
        self._flood.end_step(schedule, self._clock())
        for row in schedule.rows:
            request = row.request
            if request.status is not Status.RUNNING:
                continue
            num_before = request.num_computed_tokens
            request.num_computed_tokens = num_before + row.num_tokens
            if row.draft:
                request.num_computed_tokens -= len(row.draft)
            if request.num_computed_tokens // self.pool.block_size > num_before // self.pool.block_size:
                self.pool.register(request, num_before)
            token = tokens.get(request.id)
            if token is not None:
                assert request.num_computed_tokens == request.num_tokens, f"{request.id} sampled in mid-prompt"
                request.num_verified_tokens = request.num_computed_tokens
                request.output_ids.append(token)
                self.shares.account(request.tenant).charge(OUTPUT_COST * request.price)

    def accept(self, request: Request, token: int) -> None:
        """The token behind a draft's that was right: the request's last one, whose keys the forward has computed too.
        After commit(), in order, while the request runs."""
        request.num_computed_tokens += 1
        request.num_verified_tokens = request.num_computed_tokens
        if request.num_computed_tokens % self.pool.block_size == 0:
            self.pool.register(request, request.num_computed_tokens - 1)
        request.output_ids.append(token)
        self.shares.account(request.tenant).charge(OUTPUT_COST * request.price)

    def finish(self, request: Request) -> None:
        """The request is over, however it ended: free its blocks and adapter reference. A second call does nothing."""
        if request.status is Status.FINISHED:
            return
        if request.status is Status.RUNNING:
            self._admission.stop(request)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        self.lookup.forget(request)
        del self._requests[request.id]

    def discard(self, request: Request) -> None:
        """Finish a request whose logits are not finite: nothing it wrote or read is readable in the prefix cache
        again."""
        self.pool.discard(request.block_ids)
        self.finish(request)

    def abort(self, request_id: str) -> Request | None:
        """Finish the request of this id; None if there is none."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request)
        return request

    def fail_waiting(self, digest: AdapterDigest, error: StoreError, *, tenant: str | None = None) -> None:
        """This adapter cannot be loaded: requests that wait for it, the tenant's or all, are in take_failed()."""
        for request in self.waiting.waiting_for(digest):
            if tenant is None or request.owner == tenant:
                self.finish(request)
                self._failed.append((request, error))

    def take_failed(self) -> list[tuple[Request, StoreError]]:
        """Requests whose adapter cannot be loaded, finished already, each reported exactly once."""
        failed, self._failed = self._failed, []
        return failed

    def take_late(self) -> list[Request]:
        """Requests whose deadline has passed, finished already, each reported exactly once."""
        late, self._late = self._late, []
        return late

    def _decode(self) -> Schedule:
        rows: list[ScheduledRow] = []
        block_size, outgrown_at, has_preempted = self.pool.block_size, self.pool.outgrown_at, False
        for request in list(self.running):
            num_tokens = len(request.prompt_ids) + len(request.output_ids)
            if num_tokens in outgrown_at and request.status is Status.RUNNING and self.pool.has_outgrown(request):
                has_preempted |= self._recompute(request)
            start = request.num_computed_tokens
            assert start < num_tokens, f"{request.id} has nothing to compute: it should have been finished"
            if num_tokens - start == 1:
                if len(request.block_ids) * block_size < num_tokens:
                    has_preempted |= self._grow(request)
                rows.append(ScheduledRow(request, start, 1))
        if has_preempted:
            rows = [row for row in rows if row.request.status is Status.RUNNING]
        return Schedule(rows, len(rows), len(rows))

    def _grow(self, request: Request) -> bool:
        """Allocate one more block for a decode row, unless it was preempted itself; returns whether any request was."""
        has_preempted = False
        while self.pool.num_free == 0 and request.status is Status.RUNNING:
            self._admission.preempt(self._slots.last_of_fullest(self.running))
            has_preempted = True
        if request.status is Status.RUNNING:
            request.block_ids += self.pool.allocate(1)
        return has_preempted

    def _recompute(self, request: Request) -> bool:
        """All of its keys must be recomputed with a longer sequence's factors. It keeps its slot if there are blocks
        for it, else it is preempted; returns whether it was."""
        self.pool.release(request, request.num_written_tokens)
        if not self.pool.admit(request, self.pool.match(request), num_spare=0):
            self._admission.preempt(request)
            return True
        request.num_preemptions += 1
        return False

    def _state(self) -> tuple[int, int, int]:
        """Changes whenever a slot is taken or given up, a request arrives, or an adapter becomes ready."""
        return self._slots.num_changes, self.waiting.num_arrivals, self._memory.num_activations


def _launched(schedule: Schedule) -> Schedule | None:
    """From now on its forward may have written keys and values, however it ends."""
    for row in schedule.rows:
        request = row.request  # may be behind what it has written already: then a row of it was wasted
        end = row.start + row.num_tokens
        if request.num_written_tokens < end:  # noqa: PLR1730  max() is a call for every row of every step
            request.num_written_tokens = end
    return schedule if schedule.rows else None
