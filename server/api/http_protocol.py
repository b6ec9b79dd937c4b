"""uvicorn's HTTP/1.1 connection with the bounds it lacks: time and bytes for headers, time for a reader, a count of
connections. Knows no ASGI app.

Tried on uvicorn 0.54: half a request line keeps its connection for ever, and a single header may have 5 MB.
"""

from __future__ import annotations

import asyncio
import os
import socket
from asyncio.trsock import TransportSocket
from collections import Counter
from http import HTTPStatus
from typing import cast
from uuid import uuid4

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.errors import ApiError
from server.api.json_text import json_bytes
from server.api.settings import ApiSettings


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. Made per settings by `protocol_with`.

    The header clock runs from a connection's or a next request's first moment until its headers are complete; also
    while the rest of a body that was refused is still coming, which bounds how long that may take.
    """

    settings: ApiSettings
    num_by_address: Counter[str]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._header_clock: asyncio.TimerHandle | None = None
        self._write_clock: asyncio.TimerHandle | None = None
        self._num_header_bytes = 0
        self._is_in_headers = False
        super().connection_made(cast(asyncio.Transport, transport))  # uvloop's is not a subclass of it
        _send_at_once(transport.get_extra_info("socket"))
        self._address = self.client[0] if self.client else ""
        self.num_by_address[self._address] += 1
        refusal = self._refusal()
        if refusal is not None:
            self._refuse(refusal)
            return
        self._start_header_clock()

    def _refusal(self) -> ApiError | None:
        """Why this connection is one too many. Those without an address come through a local socket: all one's own."""
        most, each = self.settings.max_connections, self.settings.max_connections_per_address
        if len(self.connections) > most:
            return ApiError(503, "too_many_connections", f"the server has its {most} connections", retry_after_s=1.0)
        if self._address and self.num_by_address[self._address] > each:
            message = f"your address has its {each} connections"
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
        if not self._is_in_headers:
            return
        self._num_header_bytes += len(data)
        if self._num_header_bytes > self.settings.max_header_bytes:
            message = f"the headers must have at most {self.settings.max_header_bytes} bytes"
            self._refuse(ApiError(431, "headers_too_large", message))

    def on_message_begin(self) -> None:
        self._is_in_headers, self._num_header_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        self._stop_header_clock()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "invalid_http", msg))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_write_clock()
        self._write_clock = self.loop.call_later(self.settings.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_clock()
        super().resume_writing()

    @property
    def _is_idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

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
        message = f"the headers did not come within {self.settings.header_timeout_s:g} s"
        self._refuse(ApiError(408, "request_timeout", message))

    def _refuse(self, error: ApiError) -> None:
        """Answer and close. Where an answer is being sent already, only close: two cannot be told apart."""
        if self.transport.is_closing():
            return
        if self._is_idle:
            self.transport.write(_whole_response(error))
        self.transport.close()


def protocol_with(settings: ApiSettings) -> type[BoundedHttpProtocol]:
    """The protocol with these bounds, as uvicorn wants it: a class."""
    own = {"settings": settings, "num_by_address": Counter()}
    return type("BoundedHttpProtocol", (BoundedHttpProtocol,), own)


def _send_at_once(connection: TransportSocket) -> None:
    """Turn Nagle's algorithm off. asyncio does so for sockets that it made itself, but not for one that it is given:
    there every answer would wait 40 ms. uvloop always does, and its transports allow no `setsockopt`."""
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _whole_response(error: ApiError) -> bytes:
    body = json_bytes(error.body)
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-request-id": f"req_{uuid4().hex}",
        **error.headers,
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
