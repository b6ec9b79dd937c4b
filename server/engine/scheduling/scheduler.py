"""Decides which requests run next, and on which tokens. Knows tokens, blocks and adapter references; knows nothing of
tensors, text or HTTP. Who is admitted first is `admission`'s decision, who owns a block is `kv_blocks`'.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import StoreError
from server.engine.queueing.candidates import Starving
from server.engine.queueing.fair_share import OUTPUT_COST, FairShare, TenantAccount
from server.engine.queueing.waiting_queue import FairAdmission
from server.engine.request import Request, Status
from server.engine.schedule import AdapterGate, Schedule, ScheduledRow, SchedulerSettings
from server.engine.scheduling.block_pool import BlockPool
from server.engine.scheduling.chunked_prefill import PromptChunks
from server.engine.scheduling.flood_control import OverShare
from server.engine.scheduling.limits import Deadlines, Intake
from server.engine.scheduling.overlap import LookAhead
from server.engine.scheduling.preemption import BlockShares, Places

__all__ = ["AdapterGate", "Schedule", "ScheduledRow", "Scheduler", "SchedulerSettings"]

_MAX_LOOKS = 4  # in one step, at tenants that may have another's place


class _Verdict(Enum):
    ADMITTED = auto()
    WAITS_FOR_TWIN = auto()
    NO_BLOCKS = auto()


class Scheduler:
    """Continuous batching with chunked prefill and preemption by recompute. One engine thread owns it."""

    def __init__(
        self,
        settings: SchedulerSettings,
        pool: BlockPool,
        gate: AdapterGate,
        *,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.pool = pool
        self._gate = gate
        self._clock = clock
        self._waiting = FairAdmission(lookahead=settings.lookahead, starvation_s=settings.starvation_s)
        self.intake = Intake(
            settings,
            max_model_len=max_model_len,
            kv_tokens=pool.num_blocks * pool.block_size,
            num_waiting=self._waiting.__len__,
            num_waiting_of=self._waiting.num_waiting_of,
        )
        self.shares: FairShare = self._waiting.shares
        self._places = Places(settings, self.shares)
        self._block_shares = BlockShares(pool, self.shares)
        self._over_share = OverShare(settings, self.shares, self._places)
        self._chunks = PromptChunks(settings, self.shares, self._over_share)
        self._deadlines = Deadlines()
        self._running: list[Request] = []  # in order of admission
        self._requests: dict[str, Request] = {}
        self._failed: list[tuple[Request, StoreError]] = []
        self._late: list[Request] = []
        self._starving: Starving | None = None
        self._ahead = LookAhead(pool)
        self._num_watermark = int(settings.watermark * pool.num_blocks)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_tenants_waiting(self) -> int:
        return self._waiting.num_tenants

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def waiting_adapters(self) -> list[AdapterDigest]:
        """Distinct adapters of waiting requests."""
        return self._waiting.adapters()

    def running_adapters(self) -> list[AdapterDigest]:
        """Distinct adapters of running requests."""
        return list(dict.fromkeys(request.adapter for request in self._running if request.adapter is not None))

    def get(self, request_id: str) -> Request | None:
        """The unfinished request of this id."""
        return self._requests.get(request_id)

    def running(self) -> Sequence[Request]:
        """Running requests in order of admission."""
        return self._running

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest if it can never fit, QueueFull if too many wait."""
        assert request.id not in self._requests, f"{request.id} added twice"
        assert request.status is Status.WAITING, f"{request.id} is over already"
        self.intake.check_fits(request)
        self.intake.check_queue(request.tenant)
        self._requests[request.id] = request
        self._waiting.push(request)
        if request.deadline_s is not None:
            self._deadlines.watch(request.id, request.deadline_s)

    def schedule(self) -> Schedule | None:
        """The next forward, or None if nothing can run now. Running decodes first, then prefills, then the queue."""
        now_s = self._clock()
        self._attend(now_s)
        self._over_share.begin(now_s)
        schedule = self._decode()
        held_up = self._chunks.go_on(schedule, self._running)
        if self._waiting and self._may_open_place():
            self._admit(schedule, self._starving, now_s)
        for request in held_up:
            if request.status is Status.RUNNING:
                self._chunks.add(schedule, request)
        self._over_share.leave_out(schedule)
        self._ahead.looked(self._state())
        return _on_its_way(schedule)

    def attend(self) -> None:
        """What schedule() does first, for a step whose forward is chosen already: end whoever is late, bring on the
        adapters that are waited for, charge for those that have come."""
        self._attend(self._clock())

    def look_ahead(self, schedule: Schedule) -> Schedule | None:
        """The forward after `schedule`, which is under way and whose rows are current, where nothing that it decides
        matters; None: schedule() is to choose it.

        A request that ends all the same has a row too many: it will not be current.
        """
        if len(schedule.rows) < len(self._running) or (self._waiting and self._starving is not None):
            return None
        ahead = self._ahead.after(schedule, self._state(), is_anyone_waiting=bool(self._waiting))
        return None if ahead is None else _on_its_way(ahead)

    def commit(self, schedule: Schedule, tokens: Mapping[str, int]) -> None:
        """The forward ran. tokens: request id -> sampled token, one for each row that samples. All rows are current.

        A request finished meanwhile is passed over. A row may lack its token only if the request is finished before
        the next schedule().
        """
        self._over_share.ran(schedule, self._clock())
        for row in schedule.rows:
            request = row.request
            if request.status is not Status.RUNNING:
                continue
            num_before = request.num_computed_tokens
            request.num_computed_tokens = num_before + row.num_tokens
            if request.num_computed_tokens // self.pool.block_size > num_before // self.pool.block_size:
                self.pool.register(request, num_before)
            token = tokens.get(request.id)
            if token is not None:
                assert request.num_computed_tokens == request.num_tokens, f"{request.id} sampled in mid-prompt"
                request.num_verified_tokens = request.num_computed_tokens
                request.output_ids.append(token)
                self.shares.account(request.tenant).charge(OUTPUT_COST * request.price)

    def finish(self, request: Request) -> None:
        """The request is over, however it ended: blocks and adapter reference come back. A second call does nothing."""
        if request.status is Status.FINISHED:
            return
        if request.status is Status.RUNNING:
            self._stop_running(request)
        else:
            self._waiting.remove(request)
        request.status = Status.FINISHED
        del self._requests[request.id]

    def discard(self, request: Request) -> None:
        """Finish a request whose logits are not finite: nothing it wrote or read is found in the prefix cache again."""
        self.pool.discard(request.block_ids)
        self.finish(request)

    def abort(self, request_id: str) -> Request | None:
        """Finish the request of this id; None if there is none (any more)."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request)
        return request

    def fail_waiting(self, digest: AdapterDigest, error: StoreError, *, tenant: str | None = None) -> None:
        """This adapter cannot come (any more): requests that wait for it, the tenant's or all, are in take_failed()."""
        for request in self._waiting.line(digest):
            if tenant is None or request.tenant == tenant:
                self.finish(request)
                self._failed.append((request, error))

    def take_failed(self) -> list[tuple[Request, StoreError]]:
        """Requests whose adapter cannot come, finished already, each reported exactly once."""
        failed, self._failed = self._failed, []
        return failed

    def take_late(self) -> list[Request]:
        """Requests whose deadline has passed, finished already, each reported exactly once."""
        late, self._late = self._late, []
        return late

    def _attend(self, now_s: float) -> None:
        for request_id in self._deadlines.take_late(now_s):
            if (request := self.abort(request_id)) is not None:
                self._late.append(request)
        for owner, num_elements in self._gate.take_loads():
            self._waiting.charge_load(owner, num_elements)
        self._starving = self._waiting.starving(self._gate.no_room_since, self._gate.over_share, now_s)
        wanted, limit = self._waiting.wanted_beside(self._starving)
        for digest, error in self._gate.want(wanted, limit).items():
            self.fail_waiting(digest, error)

    def _decode(self) -> Schedule:
        rows: list[ScheduledRow] = []
        block_size, outgrown_at, has_preempted = self.pool.block_size, self.pool.outgrown_at, False
        for request in self._running.copy():
            num_tokens = len(request.prompt_ids) + len(request.output_ids)
            if num_tokens in outgrown_at and request.status is Status.RUNNING and self.pool.has_outgrown(request):
                has_preempted |= self._begin_anew(request)
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
        """One more block for a decode row, unless it was preempted itself; whether anybody was."""
        has_preempted = False
        while self.pool.num_free == 0 and request.status is Status.RUNNING:
            self._preempt(self._places.last_of_fullest(self._running))
            has_preempted = True
        if request.status is Status.RUNNING:
            request.block_ids += self.pool.allocate(1)
        return has_preempted

    def _begin_anew(self, request: Request) -> bool:
        """All of its keys are to be computed again, with a longer sequence's factors: in its place where there are
        blocks for it, else it is preempted; whether it was."""
        self.pool.release(request, request.num_written_tokens)
        if not self.pool.admit(request, self.pool.match(request), num_spare=0):
            self._preempt(request)
            return True
        request.num_preemptions += 1
        return False

    def _preempt(self, request: Request) -> None:
        """Back to the front of the queue without blocks or adapter; its tokens stay and are recomputed."""
        assert len(self._running) > 1, f"{request.id} runs alone and has no block left"
        self._stop_running(request)
        self._wait_again(request)

    def _wait_again(self, request: Request) -> None:
        request.status = Status.WAITING
        request.num_preemptions += 1
        self._waiting.push_front(request)

    def _stop_running(self, request: Request) -> None:
        self._running.remove(request)
        self._places.leave(request)
        self.pool.release(request, request.num_written_tokens)
        if request.adapter is not None:
            self._gate.release(request.adapter)
        request.slot = None

    @property
    def _num_spare(self) -> int:
        """Blocks to leave when admitting: whoever runs needs one soon, and taking it would only preempt somebody."""
        return max(self._num_watermark, len(self._running)) if self._running else 0

    def _may_open_place(self) -> bool:
        arrivals, activations = self._waiting.num_arrivals, self._gate.num_activations
        has_blocks = self.pool.num_free > self._num_spare
        return self._places.may_open(len(self._running), arrivals, activations, has_blocks=has_blocks)

    def _admit(self, schedule: Schedule, starving: Starving | None, now_s: float) -> None:
        """Where all places or blocks are taken, some may change hands: see `Places` and `BlockShares`. Not while
        somebody starves: who was put out stands before it and would keep its adapter in use for longer."""
        walk = self._waiting.walk(self._gate.ready(), self._gate.num_activations, starving, self._gate.crowding)
        admitted: list[Request] = []
        put_out: list[Request] = []
        num_passed_over = num_looks = 0
        is_short = False  # of blocks, for somebody before: only those held beyond a share may be had
        while (account := walk.account) is not None and schedule.num_tokens < self.settings.max_batch_tokens:
            is_full = len(self._running) >= self.settings.max_running
            num_looks += is_full or is_short
            if num_looks > _MAX_LOOKS:
                break
            victim = None
            if is_full and starving is None:
                victim = self._places.victim_for(account, self._running, self._over_share.flooding, now_s)
            if (is_full and victim is None) or self._is_kept_out(account, schedule, now_s):
                walk.skip_tenant()
            elif (request := walk.current_of(account)) is not None:
                verdict = _Verdict.NO_BLOCKS if is_short else self._try_admit(request)
                if verdict is _Verdict.NO_BLOCKS and starving is None:
                    verdict = self._admit_for_others(request, schedule, put_out, now_s)
                if verdict is _Verdict.NO_BLOCKS:
                    is_short = True
                    walk.skip_tenant()
                    continue
                num_passed_over += verdict is _Verdict.WAITS_FOR_TWIN
                if num_passed_over > self.settings.lookahead:
                    break
                if verdict is _Verdict.ADMITTED:
                    admitted.append(request)
                    if victim is not None and len(self._running) > self.settings.max_running:
                        self._put_out(victim, schedule, put_out)  # no place came with the blocks
                    self._chunks.add(schedule, request)
                walk.advance(admitted=verdict is _Verdict.ADMITTED)
        walk.close()
        self._leave_queue(admitted, now_s)
        for request in put_out:
            self._wait_again(request)

    def _admit_for_others(self, request: Request, schedule: Schedule, put_out: list[Request], now_s: float) -> _Verdict:
        """With blocks from a tenant that holds more than its own, where there are such."""
        victims = self._block_shares.who_makes_room(
            request, self._running, num_spare=self._num_spare, num_changes=self._places.num_changes, now_s=now_s
        )
        if not victims:
            return _Verdict.NO_BLOCKS
        if request.adapter is not None:
            self._gate.acquire(request.adapter)  # who is put out may be the last to hold an adapter that was deleted
        for victim in victims:
            self._put_out(victim, schedule, put_out)
        verdict = self._try_admit(request)
        if request.adapter is not None:
            self._gate.release(request.adapter)
        return verdict

    def _put_out(self, victim: Request, schedule: Schedule, put_out: list[Request]) -> None:
        put_out.append(victim)
        self._stop_running(victim)
        schedule.drop(victim)

    def _is_kept_out(self, account: TenantAccount, schedule: Schedule, now_s: float) -> bool:
        if self._places.is_reserved_from(account, len(self._running), self._over_share.flooding, now_s):
            return True
        return self._over_share.prompt_limit(schedule, account) <= schedule.num_tokens

    def _try_admit(self, request: Request) -> _Verdict:
        """Where a request finds no blocks, those behind it get none that are free, or it would starve. One whose next
        block is being computed by a running twin waits for that block and is in nobody's way."""
        matched = self.pool.match(request)
        if self.pool.is_being_computed(request, len(matched)):
            return _Verdict.WAITS_FOR_TWIN
        if not self.pool.admit(request, matched, num_spare=self._num_spare):
            return _Verdict.NO_BLOCKS
        if request.adapter is not None:
            request.slot = self._gate.acquire(request.adapter)
            assert request.slot is not None, f"{request.adapter} is ready and gives no slot"
        self._running.append(request)
        self._places.enter(request)
        return _Verdict.ADMITTED

    def _leave_queue(self, admitted: list[Request], now_s: float) -> None:
        for request in admitted:
            self._waiting.remove(request)
            request.status = Status.RUNNING
            if request.first_scheduled_s is None:
                request.first_scheduled_s = now_s
                request.num_cached_tokens = request.num_computed_tokens

    def _state(self) -> tuple[int, int, int]:
        """Changes whenever a place is taken or given up, a request is new, or an adapter becomes ready."""
        return self._places.num_changes, self._waiting.num_arrivals, self._gate.num_activations


def _on_its_way(schedule: Schedule) -> Schedule | None:
    """Whatever becomes of it, its forward may have written keys and values from now on."""
    for row in schedule.rows:
        request = row.request  # which may stand before what it has written already: then a row of it was of no use
        end = row.start + row.num_tokens
        if request.num_written_tokens < end:  # noqa: PLR1730  max() is a call for every row of every step
            request.num_written_tokens = end
    return schedule if schedule.rows else None
