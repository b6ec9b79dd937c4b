"""uvicorn's HTTP/1.1 messages with a bound on everything that is no body. Knows bytes and fields, no clock and no app.

Tried on uvicorn 0.54: trailers are added to the headers of the running request without a bound, a chunk of
256 KiB starts 14,000 pipelined requests, and a request with `Upgrade: h2c` loses its body.
"""

from __future__ import annotations

from http import HTTPStatus
from uuid import uuid4

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.api.settings import ApiSettings
from server.api.wire.errors import ApiError
from server.api.wire.json_text import json_bytes

MAX_PIPELINED = 16
_BYTES_PER_CHUNK = 16  # of a chunk's size, extension and line ends; on average, beyond the spare bytes
_UPGRADE_FIELDS = (b"upgrade", b"http2-settings")


class MessageRefused(Exception):
    """Raised in a parser's callback, which ends the parsing of what has come."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


class BoundedMessages(HttpToolsProtocol):
    """One connection's messages. A subclass calls `begin` before the first byte.

    Bytes outside bodies are taken from `_spare_bytes`, `max_header_bytes` at most. A new message and complete headers
    fill it again; every byte of a body gives one back and every chunk `_BYTES_PER_CHUNK`. So headers, trailers, chunk
    extensions and empty lines each end at the same limit, and a body in small chunks never comes near it.
    """

    settings: ApiSettings

    def begin(self) -> None:
        self._spare_bytes = self.settings.max_header_bytes
        self._num_earned_bytes = 0
        self._is_paid = False
        self._is_in_headers = False
        self._num_fields = self._num_field_bytes = 0
        self._running: RequestResponseCycle | None = None

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._num_earned_bytes, self._is_paid = 0, False
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            invalid = _invalid("Invalid HTTP request received.")
            self.refuse(cause.error if isinstance(cause, MessageRefused) else invalid)
            return
        self._pay(len(data))

    def _feed(self, data: bytes) -> None:
        """An offer to change the protocol is ignored, as RFC 9110, 7.8, allows. llhttp ends a message that makes one
        after its headers, so a new parser is given the same message without the offer."""
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode("ascii")
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % field for field in self.headers if field[0] not in _UPGRADE_FIELDS]
        return b"\r\n".join([*lines, b"", b""])

    def _pay(self, num_bytes: int) -> None:
        most = self.settings.max_header_bytes
        if self._is_paid:
            self._spare_bytes = most
            return
        self._spare_bytes = min(most, self._spare_bytes + self._num_earned_bytes - num_bytes)
        if self._spare_bytes < 0:
            what = "the headers" if self._is_in_headers else "trailers and chunk extensions"
            self.refuse(_too_large(f"{what} must have at most {most} bytes"))

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise MessageRefused(_invalid(f"at most {MAX_PIPELINED} pipelined requests may wait on one connection"))
        self._is_in_headers, self._is_paid = True, False
        self._spare_bytes = self.settings.max_header_bytes
        self._num_fields = self._num_field_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Fields after the header block count towards the same limits, and go no further."""
        self._num_fields += 1
        self._num_field_bytes += len(name) + len(value) + 4
        settings = self.settings
        if self._num_field_bytes > settings.max_header_bytes:
            raise MessageRefused(_too_large(f"the headers must have at most {settings.max_header_bytes} bytes"))
        if self._num_fields > settings.max_header_count:
            raise MessageRefused(_too_large(f"a request must have at most {settings.max_header_count} headers"))
        if self._is_in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise MessageRefused(_invalid("CONNECT is not supported: this server is no proxy"))
            return
        self._is_in_headers, self._is_paid = False, True
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._num_earned_bytes += _BYTES_PER_CHUNK

    def on_body(self, body: bytes) -> None:
        self._num_earned_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._is_paid = True
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop_requests()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self.refuse(_invalid(msg))

    def refuse(self, error: ApiError) -> None:
        """Answer and close. If another answer is being sent or comes first, only close: the client could not match this
        answer to its request."""
        if self.transport.is_closing():
            return
        if self._is_idle or not (self._is_in_headers or self.pipeline or self.cycle.response_started):
            self.transport.write(whole_response(error))
        self._drop_requests()
        self.transport.close()

    @property
    def _is_idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _drop_requests(self) -> None:
        """Pipelined requests never start; the running one sees a disconnect. uvicorn disconnects only the newest."""
        self.pipeline.clear()
        for cycle in (self._running, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()


def whole_response(error: ApiError) -> bytes:
    """An answer that no app gives, with everything that a client needs to read it; the connection ends after it."""
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


def _invalid(message: str) -> ApiError:
    return ApiError(400, "invalid_http", message)


def _too_large(message: str) -> ApiError:
    return ApiError(431, "headers_too_large", message)
