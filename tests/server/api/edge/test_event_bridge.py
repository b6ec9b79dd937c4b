"""Events across threads: in order, none lost, and one crossing for everything that waits."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from server.api.edge.event_bridge import EventBridge, Inbox
from server.api.wire.errors import ClientGone
from server.engine.request import TokenEvent


def test_events_of_every_stream_cross_together() -> None:
    async def scenario() -> None:
        bridge, inboxes = EventBridge(), [Inbox() for _ in range(64)]
        listeners = [bridge.listener(inbox, 0) for inbox in inboxes]
        loop = asyncio.get_running_loop()
        crossings = 0
        call_soon_threadsafe = loop.call_soon_threadsafe

        def counted(*args: object) -> object:
            nonlocal crossings
            crossings += 1
            return call_soon_threadsafe(*args)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign,assignment]

        def step() -> None:
            for listener in listeners:
                listener(TokenEvent("r", text="x"))

        thread = threading.Thread(target=step)
        thread.start()
        thread.join()  # the loop stands still meanwhile, as when it is busy
        for inbox in inboxes:
            assert [event.text for _, event in await inbox.take()] == ["x"]
        assert crossings == 1

    asyncio.run(scenario())


@pytest.fixture
def hasty_switches() -> Iterator[None]:
    """Threads change places as often as they can: a race that exists is met."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("hasty_switches")
def test_no_event_is_lost_or_reordered_between_two_busy_threads() -> None:
    count, num_streams = 5000, 4

    async def read(inbox: Inbox) -> list[int]:
        seen: list[int] = []
        while len(seen) < count:
            seen += [event.num_output_tokens for _, event in await inbox.take()]
        return seen

    async def scenario() -> None:
        bridge, inboxes = EventBridge(), [Inbox() for _ in range(num_streams)]
        listeners = [bridge.listener(inbox, 0) for inbox in inboxes]

        def run() -> None:
            for number in range(count):
                for listener in listeners:
                    listener(TokenEvent("r", num_output_tokens=number))

        thread = threading.Thread(target=run)
        thread.start()
        results = await asyncio.wait_for(asyncio.gather(*map(read, inboxes)), 20)
        thread.join()
        assert results == [list(range(count))] * num_streams

    asyncio.run(scenario())


def test_an_event_put_just_as_a_delivery_ends_still_arrives() -> None:
    class PutsAtTheLastMoment(deque[Any]):
        """Looks empty to the delivery, and is not any more once it has looked."""

        late: ClassVar[list[Callable[[], None]]] = []

        def __bool__(self) -> bool:
            is_empty = len(self) == 0
            if is_empty and self.late:
                self.late.pop()()
            return not is_empty

    async def scenario() -> None:
        bridge, inbox = EventBridge(), Inbox()
        listener = bridge.listener(inbox, 0)
        bridge._pending = PutsAtTheLastMoment()
        PutsAtTheLastMoment.late = [lambda: listener(TokenEvent("late"))]
        listener(TokenEvent("first"))
        seen: list[str] = []
        while len(seen) < 2:
            seen += [event.request_id for _, event in await asyncio.wait_for(inbox.take(), 1)]
        assert seen == ["first", "late"]

    asyncio.run(scenario())


def test_events_that_wait_come_in_one_batch_with_their_indices() -> None:
    async def scenario() -> None:
        bridge, inbox = EventBridge(), Inbox()
        for index in (2, 0, 1):
            bridge.listener(inbox, index)(TokenEvent("r"))
        assert [index for index, _ in await inbox.take()] == [2, 0, 1]

    asyncio.run(scenario())


def test_a_hang_up_wakes_the_reader_and_is_final() -> None:
    async def scenario() -> None:
        inbox = Inbox()
        asyncio.get_running_loop().call_soon(inbox.hang_up)
        with pytest.raises(ClientGone):
            await asyncio.wait_for(inbox.take(), 1)
        inbox.add((0, TokenEvent("r")))
        with pytest.raises(ClientGone):
            await inbox.take()

    asyncio.run(scenario())


def test_an_event_after_the_loop_is_closed_does_not_hurt_the_engine() -> None:
    bridge, inbox = EventBridge(), Inbox()

    async def scenario() -> None:
        listeners.append(bridge.listener(inbox, 0))

    listeners: list[object] = []
    asyncio.run(scenario())
    [listener] = listeners
    listener(TokenEvent("r"))  # type: ignore[operator]

    async def next_app_run() -> None:
        bridge.listener(inbox, 0)(TokenEvent("second"))
        assert [event.request_id for _, event in await asyncio.wait_for(inbox.take(), 1)] == ["second"]

    asyncio.run(next_app_run())
