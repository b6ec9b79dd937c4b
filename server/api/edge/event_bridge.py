"""Carries token events from the engine's thread to asyncio tasks. Knows neither HTTP nor what an event means.

One wake-up of the event loop delivers everything that waits, for all streams together: a step that yields a token for
each of 64 streams costs one crossing, not 64.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial

from server.api.wire.errors import ApiError, ClientGone
from server.engine.request import TokenEvent

logger = logging.getLogger(__name__)

IndexedEvent = tuple[int, TokenEvent]
MAX_TAKEN = 256  # events in one step of the event loop: some milliseconds, with 20 log-probabilities each


class Inbox:
    """The events of one HTTP call, in order, each with the index of its request. Used on the event loop only."""

    def __init__(self) -> None:
        self._events: deque[IndexedEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._hung_up = False
        self._failure: ApiError | None = None

    def add(self, event: IndexedEvent) -> None:
        self._events.append(event)
        self._wake()

    def hang_up(self) -> None:
        """The client is gone: `take` raises ClientGone at once."""
        self._hung_up = True
        self._wake()

    def fail(self, failure: ApiError) -> None:
        """No more events will come: `take` raises this after those that have arrived."""
        self._failure = failure
        self._wake()

    async def take(self, patience_s: float | None = None) -> list[IndexedEvent]:
        """1 to MAX_TAKEN events that have arrived; an empty list after patience_s without one.

        Raises ClientGone, and the error that `fail` was called with.

        If more events wait than one take returns (a slow client), other tasks run in between.
        """
        if self._events:
            await asyncio.sleep(0)
        while not self._events and not self._hung_up and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            if patience_s is None:
                await self._waiter
            elif not (await asyncio.wait([self._waiter], timeout=patience_s))[0]:
                return []
        if self._hung_up:
            raise ClientGone
        if self._failure is not None and not self._events:
            raise self._failure
        return [self._events.popleft() for _ in range(min(len(self._events), MAX_TAKEN))]

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EventBridge:
    """One per app. `listener` is called on the event loop, what it returns on any thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: deque[tuple[Inbox, IndexedEvent]] = deque()
        self._is_scheduled = False

    def listener(self, inbox: Inbox, index: int) -> Callable[[TokenEvent], None]:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._pending, self._is_scheduled = loop, deque(), False
        return partial(self._put, inbox, index)

    def _put(self, inbox: Inbox, index: int, event: TokenEvent) -> None:
        self._pending.append((inbox, (index, event)))
        if self._is_scheduled or self._loop is None:
            return
        self._is_scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop has been closed, and every reader with it
            logger.debug("an event of %s came after the server stopped", event.request_id)

    def _deliver(self) -> None:
        self._is_scheduled = False  # before draining: a put from here on schedules another delivery
        pending = self._pending
        while pending:
            inbox, event = pending.popleft()
            inbox.add(event)
