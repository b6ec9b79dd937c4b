"""Compressed bodies. Decides which codings are accepted and when a decoded body is too large."""

from __future__ import annotations

import zlib

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from server.api.wire.errors import ApiError

CHUNK_BYTES = 64 * 1024
_GZIP = ("gzip", "x-gzip")
_GZIP_WINDOW_BITS = 31


def is_gzip(headers: Headers) -> bool:
    """Whether the body is to be decoded. Raises ApiError 415 for other codings of the content, 501 for those of the
    transfer."""
    transfer = _codings(headers, "transfer-encoding")
    if transfer not in ([], ["chunked"]):
        message = f"Transfer-Encoding must be chunked, got {', '.join(transfer)[:80]!r}"
        raise ApiError(501, "unsupported_transfer_encoding", message)
    content = [coding for coding in _codings(headers, "content-encoding") if coding != "identity"]
    if not content:
        return False
    if len(content) == 1 and content[0] in _GZIP:
        return True
    message = f"Content-Encoding must be gzip or identity, got {', '.join(content)[:80]!r}"
    raise ApiError(415, "unsupported_content_encoding", message, headers={"accept-encoding": "gzip, identity"})


class GzipBody:
    """A `receive` that decodes what another one returns. At most `CHUNK_BYTES` are decoded at a time, and no more than
    `max_bytes` in all: so a small body that would decode to gigabytes costs what a large one may."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._decoder = zlib.decompressobj(_GZIP_WINDOW_BITS)
        self._encoded = b""
        self._is_last = False  # nothing more comes from `receive`
        self._may_hold_more = False  # the decoder filled its chunk, and may continue without input
        self._num_encoded_bytes = self._num_bytes = 0
        self._is_complete = False

    async def receive(self) -> Message:
        """The next chunk of the decoded body. Raises ApiError 400 if it is not gzip, 413."""
        if self._is_complete:
            return await self._receive()
        chunk = b""
        while not (chunk or self._is_complete):
            if not (self._encoded or self._may_hold_more or self._is_last):
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._encoded, self._is_last = message.get("body", b""), not message.get("more_body", False)
                self._num_encoded_bytes += len(self._encoded)
            chunk = self._decode()
        return {"type": "http.request", "body": chunk, "more_body": not self._is_complete}

    def _decode(self) -> bytes:
        try:
            chunk = self._decoder.decompress(self._encoded, CHUNK_BYTES)
        except zlib.error as error:
            raise _invalid(f"{error}") from error
        self._encoded = self._decoder.unconsumed_tail
        self._may_hold_more = len(chunk) == CHUNK_BYTES
        self._num_bytes += len(chunk)
        if self._num_bytes > self._max_bytes:
            message = f"the decoded body must have at most {self._max_bytes} bytes"
            raise ApiError(413, "too_large", message)
        if self._decoder.unused_data:
            raise _invalid("data follows the end")
        if self._is_last and not (self._encoded or self._may_hold_more):
            if self._num_encoded_bytes and not self._decoder.eof:
                raise _invalid("it ends too early")
            self._is_complete = True
        return chunk


def _codings(headers: Headers, name: str) -> list[str]:
    words = ",".join(headers.getlist(name)).lower().split(",")
    return [word.strip() for word in words if word.strip()]


def _invalid(what: str) -> ApiError:
    return ApiError(400, "invalid_gzip", f"Content-Encoding is gzip, but the body is not valid gzip: {what}")
