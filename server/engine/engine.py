"""One step at a time: schedule, run, commit, answer. Knows no thread, no asyncio and no HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import AdapterUnavailable, StoreError
from adapters_store.packed.mix import has_part
from adapters_store.tiers.entries import Owner, Residency
from adapters_store.tiers.tiers import AdapterTiers
from server.engine import numerics
from server.engine.device_fault import DeviceLost
from server.engine.metrics import EngineCounters, EngineStats, FairnessGauge, Histogram, memory_counters
from server.engine.model.forward import PendingForward, StepOutput
from server.engine.model.runner import ModelRunner
from server.engine.numerics import NumericFaults, Quarantine
from server.engine.request import Request, RequestError, Status, TokenEvent, TokenLogprob
from server.engine.schedule import Schedule, ScheduledRow
from server.engine.scheduling.scheduler import Scheduler
from server.engine.text.output import OutputDelta, OutputState

_log = logging.getLogger(__name__)

MAX_NAMES = 10_000  # of adapters asked for, the latest ones


class Engine:
    """Continuous batching over one base and many adapters. One thread owns it."""

    def __init__(
        self,
        scheduler: Scheduler,
        tiers: AdapterTiers,
        runner: ModelRunner,
        make_output: Callable[[Request], OutputState],
        *,
        load_seconds: Histogram | None = None,
        quarantine: Quarantine = lambda owned, code, message: None,
        device_error: Callable[[], str | None] = lambda: None,
    ) -> None:
        """device_error: why no later forward can succeed; None: the device answers. Asked only after a failure."""
        self.scheduler = scheduler
        self.tiers = tiers
        self._runner = runner
        self._make_output = make_output
        self.device_error = device_error
        self._outputs: dict[str, OutputState] = {}
        self._prompt_logprobs: dict[str, list[TokenLogprob | None]] = {}
        self._names: dict[AdapterDigest, str] = {}
        self._counters = EngineCounters()
        self._has_run = False
        self._ahead: tuple[Schedule, PendingForward] | None = None  # launched before its predecessor was read
        self._faults = NumericFaults(quarantine)
        self._fairness = FairnessGauge()
        self._step_seconds = Histogram()
        self._load_seconds = load_seconds or Histogram()
        self._leaving: set[AdapterDigest] = set()  # left service while requests still use them

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest or QueueFull."""
        self.scheduler.add(request)
        self._outputs[request.id] = self._make_output(request)
        if request.adapter is not None:
            self._names.pop(request.adapter, None)
            self._names[request.adapter] = request.adapter_name or request.adapter
            while len(self._names) > MAX_NAMES:  # mixes are as many as the weights that requests bring
                del self._names[next(iter(self._names))]

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a request whose client is gone; returns its final event, or None if it is over already."""
        request = self.scheduler.abort(request_id)
        if request is None:
            return None
        self._counters.aborted += 1
        return self._final(request, OutputDelta("", "abort"))

    def forget_adapter(self, digest: AdapterDigest) -> None:
        """Remove an adapter that left service, and mixes with it, from both tiers and the prefix cache, once requests
        that use it have ended."""
        in_use = {*self.scheduler.running_adapters(), *self.scheduler.waiting.adapters()}
        for each in [*(name for name in self._names if has_part(name, digest)), digest]:
            self._forget(each, is_used=each in in_use)

    def _forget(self, digest: AdapterDigest, *, is_used: bool) -> None:
        if is_used:
            self._leaving.add(digest)
            if digest in self.tiers.ready():
                self.tiers.pin(digest)  # its files may be gone: a preempted request could not load it again
            return
        self._leaving.discard(digest)
        self._faults.forget(digest)
        self.tiers.forget(digest)
        self.scheduler.pool.drop_adapter(digest)
        self.scheduler.lookup.forget_adapter(digest)
        self._names.pop(digest, None)

    def warm_adapter(self, digest: AdapterDigest, name: str, owner: Owner) -> Residency:
        """Begin to bring it to the device, though no request wants it. Raises LimitReached, StoreError."""
        self.tiers.warm(digest, owner)
        self._names.setdefault(digest, name)
        return self.tiers.residency(digest)

    def pin_adapter(self, digest: AdapterDigest) -> Residency:
        """Keep it on the device until it leaves service. Raises Conflict."""
        self.tiers.pin_resident(digest)
        return self.tiers.residency(digest)

    def unpin_adapter(self, digest: AdapterDigest) -> Residency:
        """Allow its eviction. One that left service is held for the requests that still use it."""
        if digest not in self._leaving:
            self.tiers.unpin(digest)
        return self.tiers.residency(digest)

    @property
    def idle_s(self) -> float | None:
        """How long there is nothing to do unless `wake` is called, in seconds; None: without limit."""
        return 0.0 if self._has_run else self.tiers.poll_due_s

    def step(self) -> list[TokenEvent]:
        """Finish one forward, if any request can run, and return what it did for each request.

        If the next forward does not depend on this one's tokens, it is launched before they are read. The device then
        works while the answers are delivered. Raises DeviceLost if the device has failed for good.
        """
        schedule, pending = self._next()
        self._has_run = schedule is not None
        events = [self._adapter_failed(request, error) for request, error in self.scheduler.take_failed()]
        events += [self._too_late(request) for request in self.scheduler.take_late()]
        if schedule is None:
            return events
        start_s = time.perf_counter()
        output = self._run(schedule, pending, events)
        self._step_seconds.observe(time.perf_counter() - start_s)
        events += self._not_finite(output.non_finite)
        for request in output.undecided:
            schedule.drop(request)
        self.scheduler.commit(schedule, output.tokens)
        self._counters.steps += 1
        for row in schedule.rows:
            if row.request.status is Status.RUNNING:
                events += self._answers(row, output)
        return events

    def _next(self) -> tuple[Schedule | None, PendingForward | None]:
        """The forward under way, if a request in it continues; else the one the scheduler chooses now."""
        if self._ahead is not None:
            (schedule, pending), self._ahead = self._ahead, None
            self.scheduler.before_step()
            schedule.keep_current()
            if schedule.rows:
                return schedule, pending
        return self.scheduler.schedule(), None

    def _run(self, schedule: Schedule, pending: PendingForward | None, events: list[TokenEvent]) -> StepOutput:
        try:
            if pending is None:
                self._zero_blocks()
                pending = self._runner.launch(schedule)
            self._launch_next(schedule, pending)
            return pending.read(schedule.rows)
        except Exception as error:  # noqa: BLE001  what one request caused must not end the others
            self._require_device(error)
            _log.exception("a forward of %d requests failed; running each alone", len(schedule.rows))
            self._ahead = None  # it continued from the failed one
            return self._run_one_by_one(schedule, events)

    def _launch_next(self, schedule: Schedule, pending: PendingForward) -> None:
        """Launch the forward after this one, if it does not depend on this one's tokens."""
        ahead = self.scheduler.schedule_next(schedule) if pending.may_be_followed else None
        if ahead is None:
            return
        self._zero_blocks()
        next_pending = self._runner.launch_after(pending, ahead)
        if next_pending is not None:
            self._ahead = ahead, next_pending
            self._counters.steps_ahead += 1

    def _zero_blocks(self) -> None:
        self._runner.zero_blocks(self.scheduler.pool.take_blocks_to_zero())

    def _run_one_by_one(self, schedule: Schedule, events: list[TokenEvent]) -> StepOutput:
        """Repeat a failed forward row by row (writing the same KV again is harmless); fail those that fail alone."""
        self._counters.isolated_steps += 1
        output = StepOutput()
        for row in schedule.rows:
            try:
                output.merge(self._runner.run(Schedule([row], row.num_tokens, 0)))
            except Exception as error:  # noqa: BLE001  this request's own failure
                self._require_device(error)
                _log.exception("request %s failed alone", row.request.id)
                self.scheduler.discard(row.request)
                message = f"the model failed on this request: {type(error).__name__}"
                events.append(self._failed(row.request, RequestError("engine_error", message)))
        return output

    def _require_device(self, error: Exception) -> None:
        """Raises DeviceLost if every later forward would fail too: then no request is at fault."""
        reason = self.device_error()
        if reason is not None:
            raise DeviceLost(reason) from error

    def _answers(self, row: ScheduledRow, output: StepOutput) -> list[TokenEvent]:
        """What the step did for a request that still runs; finishes it when its output ends."""
        request = row.request
        self._keep_prompt_logprobs(row, output)
        self._count_prompt_tokens(row)
        token = output.tokens.get(request.id)
        if token is None:
            if request.num_computed_tokens < request.num_tokens:
                return []  # in mid-prompt
            embedding = output.embeddings.get(request.id)
            if embedding is not None:  # finite, so what it read is too
                request.num_verified_tokens = request.num_computed_tokens
            event = self._finish(request, OutputDelta("", "length"))  # max_tokens 0: the client wants only the prompt
            event.embedding = embedding
            return [event]
        self._counters.draft_tokens += len(row.draft)
        events = [self._answer(request, token, output.logprobs.get(request.id))]
        for follower, logprob in output.followers.get(request.id, ()):
            if request.status is not Status.RUNNING:
                break
            self._counters.accepted_draft_tokens += 1
            self.scheduler.accept(request, follower)
            events.append(self._answer(request, follower, logprob))
        return events

    def _answer(self, request: Request, token: int, logprob: TokenLogprob | None) -> TokenEvent:
        """The request's newest token, which is the last of its output already."""
        self._counters.generated_tokens += 1
        delta = self._outputs[request.id].append(token)
        if request.constraint is not None:
            request.constraint.advance(request.output_ids)
            if request.constraint.failure is not None:
                self.scheduler.finish(request)
                return self._failed(request, request.constraint.failure)
            if request.constraint.is_complete:
                delta = self._completed(request, delta)
        event = self._event(request, delta) if delta.finish_reason is None else self._finish(request, delta)
        event.token_ids = [token]
        if logprob is not None:
            event.logprobs = [logprob]
        return event

    def _completed(self, request: Request, delta: OutputDelta) -> OutputDelta:
        """The constraint allows nothing more: the output ends here, whatever else would have ended it."""
        if delta.finish_reason is None:
            return delta.followed_by(self._outputs[request.id].finish("stop"))
        return delta._replace(finish_reason="stop")

    def _count_prompt_tokens(self, row: ScheduledRow) -> None:
        if row.start < len(row.request.prompt_ids) and row.request.num_preemptions == 0:
            self._counters.computed_prompt_tokens += min(row.num_tokens, len(row.request.prompt_ids) - row.start)

    def _keep_prompt_logprobs(self, row: ScheduledRow, output: StepOutput) -> None:
        chunk = output.prompt_logprobs.get(row.request.id)
        if chunk is None or self._outputs[row.request.id].num_tokens > 0:  # delivered already, with the first token
            return
        known = self._prompt_logprobs.setdefault(row.request.id, [None])
        del known[row.start + 1 :]  # a chunk recomputed after a preemption
        known += chunk

    def _finish(self, request: Request, delta: OutputDelta) -> TokenEvent:
        self._counters.finished += 1
        self.scheduler.finish(request)
        return self._final(request, delta)

    def _final(self, request: Request, delta: OutputDelta) -> TokenEvent:
        event = self._event(request, delta)
        event.finish_reason, event.stop_reason = delta.finish_reason, delta.stop_reason
        self._counters.preemptions += request.num_preemptions
        self._runner.forget(request.id)
        self._outputs.pop(request.id, None)
        self._prompt_logprobs.pop(request.id, None)
        if request.adapter in self._leaving:
            self.forget_adapter(request.adapter)
        return event

    def _event(self, request: Request, delta: OutputDelta) -> TokenEvent:
        return TokenEvent(
            request.id,
            text=delta.text,
            marks=delta.marks,
            prompt_logprobs=self._prompt_logprobs.pop(request.id, None),
            num_prompt_tokens=len(request.prompt_ids),
            num_output_tokens=len(request.output_ids),
            num_reasoning_tokens=self._outputs[request.id].num_reasoning_tokens,
            num_cached_tokens=request.num_cached_tokens,
        )

    def _failed(self, request: Request, error: RequestError) -> TokenEvent:
        self._counters.failed += 1
        event = self._final(request, self._outputs[request.id].finish("error"))
        event.error = error
        return event

    def _adapter_failed(self, request: Request, error: StoreError) -> TokenEvent:
        failure = RequestError(error.code, error.message, error.status, error.retry_after_s)
        return self._failed(request, failure)

    def _too_late(self, request: Request) -> TokenEvent:
        message = f"the deadline passed after {len(request.output_ids)} of {request.params.max_tokens} tokens"
        self._counters.expired += 1
        return self._failed(request, RequestError("deadline_exceeded", message, status=504))

    def _not_finite(self, requests: Sequence[Request]) -> list[TokenEvent]:
        """Fail each request alone. If its adapter is quarantined now, the tenant's waiting requests for it are answered
        in the next step."""
        if not requests:
            return []
        for tenant, digest in self._faults.record(requests):
            self._counters.quarantined += 1
            name = next(each.adapter_name for each in requests if (each.owner, each.adapter) == (tenant, digest))
            message = f"adapter {name or digest} is not served: its numbers are not finite"
            self.scheduler.fail_waiting(digest, AdapterUnavailable("adapter_quarantined", message), tenant=tenant)
        return [self._numerics_failed(request) for request in requests]

    def _numerics_failed(self, request: Request) -> TokenEvent:
        self.scheduler.discard(request)
        name = request.adapter_name or "the base"
        message = f"{name} produced numbers that are not finite after {request.num_tokens} tokens"
        return self._failed(request, RequestError(numerics.CODE, message))

    def stats(self) -> EngineStats:
        """A snapshot; taken on the engine's thread."""
        tiers, residents, queued = self.tiers.stats(), self.tiers.resident(), self.scheduler.waiting.adapters()
        counters = {name: float(value) for name, value in asdict(self._counters).items()}
        counters |= memory_counters(tiers, self.scheduler.pool.stats)
        return EngineStats(
            num_waiting=self.scheduler.num_waiting,
            num_running=self.scheduler.num_running,
            kv_usage=self.scheduler.pool.usage,
            num_kv_blocks=self.scheduler.pool.num_blocks,
            kv_block_size=self.scheduler.pool.block_size,
            running_adapters=self._named([resident.digest for resident in residents]),
            waiting_adapters=self._named(queued),
            resident_adapters=tuple(resident.digest for resident in residents),
            queued_adapters=tuple(queued),
            num_adapters_fit=tiers.num_more,
            held_adapters=self.tiers.held(),
            pinned_adapters=tuple(resident.digest for resident in residents if resident.pinned),
            counters=counters,
            gauges={
                "adapters_resident": float(tiers.num_resident),
                "adapter_pool_usage_ratio": tiers.used_elements / max(1, tiers.capacity_elements),
                "adapter_pool_largest_free_ratio": tiers.largest_free_ratio,
                "adapter_working_set_ratio": tiers.working_set_ratio,
                "fairness_jain": self._fairness.read(self.scheduler.shares.accounts(), time.monotonic()),
                "tenants_waiting": float(self.scheduler.waiting.num_tenants),
                "adapter_host_bytes": float(tiers.host.num_bytes),
            },
            histograms={
                "step_seconds": self._step_seconds.snapshot(),
                "adapter_load_seconds": self._load_seconds.snapshot(),
            },
        )

    def _named(self, digests: list[AdapterDigest]) -> tuple[str, ...]:
        return tuple(self._names.get(digest, digest) for digest in digests)
