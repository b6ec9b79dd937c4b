"""Decides which waiting requests start to run, and starts and stops them. Knows slots, blocks and adapter references;
knows nothing of tensors, text or HTTP. The order of candidates is `queueing`'s, the choice of victims `preemption`'s.
"""

from __future__ import annotations

from enum import Enum, auto

from adapters_store.tiers.entries import AdapterSnapshot
from adapters_store.tiers.tiers import AdapterTiers
from server.engine.queueing.candidates import Starving
from server.engine.queueing.fair_share import TenantAccount
from server.engine.queueing.waiting_queue import WaitingQueue
from server.engine.request import Request, Status
from server.engine.schedule import Schedule, SchedulerSettings
from server.engine.scheduling.block_pool import BlockPool
from server.engine.scheduling.chunked_prefill import ChunkedPrefill
from server.engine.scheduling.flood_control import FloodControl
from server.engine.scheduling.preemption import BlockPreemption, RunningSlots

_MAX_EXCHANGES = 4  # candidates of one step that may need another tenant's slot or blocks


class _Verdict(Enum):
    ADMITTED = auto()
    WAITS_FOR_TWIN = auto()
    NO_BLOCKS = auto()


class Admission:
    """running: requests in order of admission."""

    def __init__(
        self,
        settings: SchedulerSettings,
        pool: BlockPool,
        adapters: AdapterTiers,
        waiting: WaitingQueue,
        *,
        slots: RunningSlots,
        flood: FloodControl,
        prefill: ChunkedPrefill,
    ) -> None:
        self.running: list[Request] = []
        self._settings = settings
        self._pool = pool
        self._adapters = adapters
        self._waiting = waiting
        self._slots = slots
        self._flood = flood
        self._prefill = prefill
        self._block_preemption = BlockPreemption(pool, waiting.shares)
        self._num_watermark = int(settings.watermark * pool.num_blocks)

    def is_possible(self, num_activations: int) -> bool:
        """Whether a pass through the queue could admit a request."""
        has_blocks = self._pool.num_free > self._num_spare
        return self._slots.may_admit(
            len(self.running), self._waiting.num_arrivals, num_activations, has_blocks=has_blocks
        )

    def admit(self, schedule: Schedule, memory: AdapterSnapshot, starving: Starving | None, now_s: float) -> None:
        """Add candidates to the forward until slots, blocks or tokens run out.

        When all slots or blocks are taken, some may change hands: see `preemption`. Not while a request starves: a
        preempted request is ahead of it in the queue and would keep its adapter in use for longer.
        """
        candidates = self._waiting.candidates(memory.ready, memory.num_activations, starving, memory.over_share_tenants)
        admitted: list[Request] = []
        preempted: list[Request] = []
        num_passed_over = num_exchanges = 0
        is_short = False  # of blocks, for an earlier candidate: only blocks held beyond a share may be taken
        while (account := candidates.account) is not None and schedule.num_tokens < self._settings.tokens_per_step:
            is_full = len(self.running) >= self._settings.running_slots
            num_exchanges += is_full or is_short
            if num_exchanges > _MAX_EXCHANGES:
                break
            victim = None
            if is_full and starving is None:
                victim = self._slots.victim_for(account, self.running, self._flood.noisy, now_s)
            if (is_full and victim is None) or self._is_kept_out(account, schedule, now_s):
                candidates.skip_tenant()
            elif (request := candidates.current_of(account)) is not None:
                verdict = self._try_admit(request, may_take_free=not is_short)
                if verdict is _Verdict.NO_BLOCKS and starving is None:
                    verdict = self._admit_by_preemption(request, schedule, preempted, now_s)
                if verdict is _Verdict.NO_BLOCKS:
                    is_short = True
                    candidates.skip_tenant()
                    continue
                num_passed_over += verdict is _Verdict.WAITS_FOR_TWIN
                if num_passed_over > self._settings.lookahead:
                    break
                if verdict is _Verdict.ADMITTED:
                    admitted.append(request)
                    if victim is not None and len(self.running) > self._settings.running_slots:
                        self._take_out(victim, schedule, preempted)  # the blocks came without a slot
                    self._prefill.add(schedule, request)
                candidates.advance(account, admitted=request if verdict is _Verdict.ADMITTED else None)
        candidates.close()
        self._leave_queue(admitted, now_s)
        for request in preempted:
            self._requeue(request)

    def preempt(self, request: Request) -> None:
        """Back to the front of the queue without blocks or adapter; its tokens stay and are recomputed."""
        assert len(self.running) > 1, f"{request.id} runs alone and has no block left"
        self.stop(request)
        self._requeue(request)

    def stop(self, request: Request) -> None:
        """The running request gives up its slot, blocks and adapter reference."""
        self.running.remove(request)
        self._slots.leave(request)
        self._pool.release(request, request.num_written_tokens)
        if request.adapter is not None:
            self._adapters.release(request.adapter)
        request.slot = None

    def _requeue(self, request: Request) -> None:
        request.status = Status.WAITING
        request.num_preemptions += 1
        self._waiting.push_front(request)

    @property
    def _num_spare(self) -> int:
        """Blocks to leave free: each running request needs one soon, and would preempt another to get it."""
        return max(self._num_watermark, len(self.running)) if self.running else 0

    def _admit_by_preemption(
        self, request: Request, schedule: Schedule, preempted: list[Request], now_s: float
    ) -> _Verdict:
        """With blocks from a tenant that holds more than its share, if there is one."""
        victims = self._block_preemption.victims_for(
            request, self.running, num_spare=self._num_spare, num_changes=self._slots.num_changes, now_s=now_s
        )
        if not victims:
            return _Verdict.NO_BLOCKS
        if request.adapter is not None:
            self._adapters.acquire(request.adapter)  # a victim may be the last user of an adapter that was deleted
        for victim in victims:
            self._take_out(victim, schedule, preempted)
        verdict = self._try_admit(request)
        if request.adapter is not None:
            self._adapters.release(request.adapter)
        return verdict

    def _take_out(self, victim: Request, schedule: Schedule, preempted: list[Request]) -> None:
        preempted.append(victim)
        self.stop(victim)
        schedule.drop(victim)

    def _is_kept_out(self, account: TenantAccount, schedule: Schedule, now_s: float) -> bool:
        if self._slots.is_reserved_from(account, len(self.running), self._flood.noisy, now_s):
            return True
        return self._flood.prompt_limit(schedule, account) <= schedule.num_tokens

    def _try_admit(self, request: Request, *, may_take_free: bool = True) -> _Verdict:
        """If a request finds no blocks, later ones get no free ones, or it would starve. A request whose next block is
        being computed by a running twin waits for that block and blocks no other request."""
        matched = self._pool.match(request)
        if self._pool.is_being_computed(request, len(matched)):
            return _Verdict.WAITS_FOR_TWIN
        if not may_take_free or not self._pool.admit(request, matched, num_spare=self._num_spare):
            return _Verdict.NO_BLOCKS
        if request.adapter is not None:
            request.slot = self._adapters.acquire(request.adapter)
            assert request.slot is not None, f"{request.adapter} is ready and gives no slot"
        self.running.append(request)
        self._slots.enter(request)
        return _Verdict.ADMITTED

    def _leave_queue(self, admitted: list[Request], now_s: float) -> None:
        for request in admitted:
            self._waiting.remove(request)
            request.status = Status.RUNNING
            if request.first_scheduled_s is None:
                request.first_scheduled_s = now_s
                request.num_cached_tokens = request.num_computed_tokens
