"""One HTTP call's requests inside the engine: submitted together, watched, and aborted together. Knows no JSON."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.types import Receive

from server.api.context import ApiContext
from server.api.edge.event_bridge import Inbox, IndexedEvent
from server.api.edge.request_context import answer_with
from server.api.generation.call import Call
from server.api.generation.parts.call_metrics import CallMetrics
from server.api.generation.parts.progress import CallProgress
from server.api.wire.errors import ApiError, engine_dead, from_engine
from server.engine.request import QueueFull, Request, TokenEvent


class Generation:
    """The requests of one call. Every one that has not finished when the call ends is aborted."""

    def __init__(
        self, context: ApiContext, requests: Sequence[Request], progress: CallProgress, metrics: CallMetrics
    ) -> None:
        self._engine = context.engine
        self._bridge = context.bridge
        self._requests = requests
        self._progress = progress
        self._metrics = metrics
        self._trace = context.trace
        self._unfinished: set[str] = set()
        self.inbox = Inbox()
        self.is_submitted = False

    def submit(self) -> None:
        """Hand all requests to the engine. Raises QueueFull or InvalidRequest, ApiError 503 if the engine is dead;
        `close` aborts those that were submitted."""
        if not self._engine.is_healthy():
            raise engine_dead()
        try:
            for index, request in enumerate(self._requests):
                self._engine.submit(request, self._bridge.listener(self.inbox, index))
                self._unfinished.add(request.id)
        except QueueFull:
            self._metrics.failed("queue_full")
            raise
        self.is_submitted = True

    async def batches(self, patience_s: float | None = None) -> AsyncIterator[list[IndexedEvent]]:
        """Events as they come, until every request has finished; an empty list after each patience_s without one.
        Raises ClientGone, and ApiError when one fails, after everything that came before the failure."""
        while self._unfinished:
            events = await self.inbox.take(patience_s)
            now_s = time.perf_counter()
            for position, (index, event) in enumerate(events):
                failure = self._note(index, event, now_s)
                if failure is not None:
                    if position:
                        yield events[:position]
                    raise failure
            yield events

    def _note(self, index: int, event: TokenEvent, now_s: float) -> ApiError | None:
        self._progress.saw(index, event)
        self._metrics.saw(index, event, now_s)
        if event.finish_reason is None:
            return None
        self._unfinished.discard(event.request_id)
        if event.error is not None:
            return from_engine(event.error)
        if event.finish_reason in ("abort", "error"):
            return ApiError(503, "aborted", "The server stopped this request; send it again.", retry_after_s=1.0)
        return None

    def close(self) -> None:
        for request_id in self._unfinished:
            self._engine.abort(request_id)
        record = self._metrics.close(num_aborted=len(self._unfinished))
        if self._trace is not None:
            self._trace(record)


@asynccontextmanager
async def submitted(context: ApiContext, call: Call, progress: CallProgress) -> AsyncIterator[Generation]:
    """A running generation; leaving the block aborts its unfinished requests. Raises ApiError 429 beyond the quota."""
    target, num_sequences = call.target, len(call.requests)
    reservation = await context.meters.reserve(
        target.tenant, target.quotas, call.admission, num_tokens=call.max_tokens, num_sequences=num_sequences
    )
    answer_with(reservation.headers)
    generation = Generation(context, call.requests, progress, CallMetrics(context.metrics, call, progress))
    try:
        with context.draining.watching(generation.inbox):
            generation.submit()
            yield generation
    finally:
        generation.close()
        reservation.settle(progress.num_output_tokens + (call.num_prompts_tokens if generation.is_submitted else 0))


@asynccontextmanager
async def hang_up_watched(receive: Receive, inbox: Inbox) -> AsyncIterator[None]:
    """While the block runs, a client that closes its connection hangs up the inbox."""
    watcher = asyncio.create_task(_hang_up_on_disconnect(receive, inbox))
    try:
        yield
    finally:
        watcher.cancel()


async def _hang_up_on_disconnect(receive: Receive, inbox: Inbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
    inbox.hang_up()
