"""Accepts connections up to a limit of open ones. Knows sockets and a count, no HTTP.

asyncio's own server accepts all waiting connections before it handles any of them. A burst can use every file
descriptor of the process; then neither connections nor the store's files can be opened.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import suppress

logger = logging.getLogger(__name__)

_BATCH = 64  # connections accepted before the event loop runs other tasks
_PAUSE_S = 0.1  # after the system refused one more descriptor
_WARN_EVERY_S = 10.0


class Acceptor:
    """max_open: connections at once. open_now: protocols with an open connection; each adds and removes itself.
    refusal: sent to a connection beyond max_open before it is closed."""

    def __init__(
        self,
        make_protocol: Callable[[], asyncio.BaseProtocol],
        *,
        max_open: int,
        open_now: AbstractSet[asyncio.BaseProtocol],
        refusal: Callable[[], bytes],
    ) -> None:
        self._make_protocol = make_protocol
        self._max_open = max_open
        self._open_now = open_now
        self._refusal = refusal
        self._opening: dict[asyncio.BaseProtocol, asyncio.Task[None]] = {}  # until its task is over, open or not
        self._accepting: list[asyncio.Task[None]] = []
        self._warned_s = float("-inf")

    def start(self, listeners: list[socket.socket], backlog: int) -> None:
        """Listen, and take connections until `stop`. Raises OSError if a port is in use."""
        for listener in listeners:
            listener.setblocking(False)
            listener.listen(backlog)
        loop = asyncio.get_running_loop()
        self._accepting = [loop.create_task(self._accept_all(listener)) for listener in listeners]

    async def stop(self) -> None:
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)

    async def _accept_all(self, listener: socket.socket) -> None:
        loop, num_taken = asyncio.get_running_loop(), 0
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except ConnectionError:
                continue  # it hung up in the queue
            except OSError as error:
                self._warn(loop.time(), error)
                await asyncio.sleep(_PAUSE_S)
                continue
            self._open(connection)
            num_taken += 1
            if num_taken % _BATCH == 0:
                await asyncio.sleep(0)

    def _open(self, connection: socket.socket) -> None:
        if len(self._open_now) + len(self._opening.keys() - self._open_now) >= self._max_open:
            _refuse(connection, self._refusal())
            return
        _send_at_once(connection)
        protocol = self._make_protocol()
        self._opening[protocol] = asyncio.get_running_loop().create_task(self._hand_over(connection, protocol))

    async def _hand_over(self, connection: socket.socket, protocol: asyncio.BaseProtocol) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connection)
        except OSError as error:
            logger.debug("a connection ended before it began: %s", error)
            connection.close()
        finally:
            del self._opening[protocol]

    def _warn(self, now_s: float, error: OSError) -> None:
        if now_s - self._warned_s >= _WARN_EVERY_S:
            self._warned_s = now_s
            logger.warning("cannot accept connections: %s", error)


def _refuse(connection: socket.socket, answer: bytes) -> None:
    """Send what fits into the socket's buffer, which a short answer does, and close."""
    with connection, suppress(OSError):
        connection.setblocking(False)
        connection.send(answer)
        connection.shutdown(socket.SHUT_WR)


def _send_at_once(connection: socket.socket) -> None:
    """Turn Nagle's algorithm off: with it a small answer waits up to 40 ms."""
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):  # the client has hung up already
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
