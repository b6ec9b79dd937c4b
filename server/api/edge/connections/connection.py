"""An HTTP/1.1 connection with the bounds that uvicorn's lacks: time for headers, time for a reader, a count by
address. Knows no ASGI app.

Tried on uvicorn 0.54: half a request line keeps its connection for ever.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import cast

from server.api.edge.connections.http_messages import BoundedMessages
from server.api.settings import ApiSettings
from server.api.wire.errors import ApiError


class BoundedHttpProtocol(BoundedMessages):
    """One connection. Made per settings by `protocol_with`.

    The header clock runs from the first moment of a connection, or of its next request, until the headers are complete.
    It also runs while the rest of a refused body arrives, and so bounds that time.
    """

    settings: ApiSettings
    num_by_address: Counter[str]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._header_clock: asyncio.TimerHandle | None = None
        self._write_clock: asyncio.TimerHandle | None = None
        self.begin()
        super().connection_made(cast(asyncio.Transport, transport))  # uvloop's is not a subclass of it
        self._address = self.client[0] if self.client else ""
        self.num_by_address[self._address] += 1
        refusal = self._refusal()
        if refusal is not None:
            self.refuse(refusal)
            return
        self._start_header_clock()

    def _refusal(self) -> ApiError | None:
        """Set if its address has too many connections. A local socket has no address, and no such limit."""
        each = self.settings.max_connections_per_address
        if self._address and self.num_by_address[self._address] > each:
            message = f"this address has its maximum of {each} open connections"
            return ApiError(429, "too_many_connections", message, retry_after_s=1.0)
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_clock()
        self._stop_write_clock()
        self.num_by_address[self._address] -= 1
        if not self.num_by_address[self._address]:
            del self.num_by_address[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._header_clock is None and self._is_idle:
            self._start_header_clock()
        super().data_received(data)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if not self._is_in_headers:
            self._stop_header_clock()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_write_clock()
        self._write_clock = self.loop.call_later(self.settings.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_clock()
        super().resume_writing()

    def _start_header_clock(self) -> None:
        self._header_clock = self.loop.call_later(self.settings.header_timeout_s, self._headers_are_late)

    def _stop_header_clock(self) -> None:
        if self._header_clock is not None:
            self._header_clock.cancel()
            self._header_clock = None

    def _stop_write_clock(self) -> None:
        if self._write_clock is not None:
            self._write_clock.cancel()
            self._write_clock = None

    def _headers_are_late(self) -> None:
        message = f"the headers must arrive within {self.settings.header_timeout_s:g} s"
        self.refuse(ApiError(408, "request_timeout", message))


def protocol_with(settings: ApiSettings) -> type[BoundedHttpProtocol]:
    """The protocol with these bounds, as uvicorn wants it: a class."""
    own = {"settings": settings, "num_by_address": Counter()}
    return type("BoundedHttpProtocol", (BoundedHttpProtocol,), own)
