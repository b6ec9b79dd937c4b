"""Parses an upload as it arrives: small fields in memory, one part in a file. Knows no asyncio.

Limits are checked with every chunk, so an upload that is too large costs no more than the limit.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.api.wire.errors import ApiError

WEIGHTS = "weights"


def boundary_of(content_type: str) -> bytes:
    """The boundary of a multipart/form-data body. Raises ApiError 415 for another type, 400 without one."""
    media_type, options = parse_options_header(content_type)
    if media_type != b"multipart/form-data":
        shown = content_type.partition(";")[0][:80]
        raise ApiError(415, "unsupported_media_type", f"Content-Type must be multipart/form-data, got {shown!r}")
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= 70:
        raise ApiError(400, "invalid_multipart", "the multipart boundary must have 1 to 70 bytes")
    return boundary


@dataclass(frozen=True, slots=True)
class Upload:
    """The small fields by name, and what the client called the file."""

    fields: Mapping[str, bytes]
    filename: str


class UploadParser:
    """Feed it the body's chunks, then `finish`. A context manager that closes the file.

    limits: the most bytes of each part that may come, by name; a part of any other name is refused. file_part: the
    one that goes into `spool`. optional: names of parts that may be absent.
    """

    def __init__(
        self,
        boundary: bytes,
        spool: Path,
        limits: Mapping[str, int],
        file_part: str = WEIGHTS,
        optional: Container[str] = (),
    ) -> None:
        self._limits = limits
        self._optional = optional
        self._file_part = file_part
        self._filename = ""
        self._file: BinaryIO = spool.open("xb")
        self._sizes: dict[str, int] = {}
        self._fields: dict[str, bytearray] = {}
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._name = ""
        self._is_complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_end": self._on_end,
            },
        )

    def __enter__(self) -> UploadParser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def feed(self, data: bytes) -> None:
        """Raises ApiError 400 for what is not such a form, 413 for too much."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise ApiError(400, "invalid_multipart", f"the body is not multipart/form-data: {error}") from error

    def finish(self) -> Upload:
        """The small fields, once everything has come. Raises ApiError 400 for a form cut short or a missing part."""
        if not self._is_complete:
            raise ApiError(400, "invalid_multipart", "the multipart body ends before its last boundary")
        for name in self._limits:
            if name not in self._sizes and name not in self._optional:
                message = f"Missing required parameter: {name!r}."
                raise ApiError(400, "missing_required_parameter", message, param=name)
        self._file.flush()
        return Upload({name: bytes(value) for name, value in self._fields.items()}, self._filename)

    def _on_part_begin(self) -> None:
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name not in self._limits:
            raise ApiError(400, "unknown_parameter", f"Unknown parameter: {self._name[:80]!r}.", param=self._name[:80])
        if self._name in self._sizes:
            raise ApiError(400, "invalid_multipart", f"duplicate part {self._name}", param=self._name)
        self._sizes[self._name] = 0
        if self._name == self._file_part:
            self._filename = options.get(b"filename", b"").decode("utf-8", "replace")
        else:
            self._fields[self._name] = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        name = self._name
        self._sizes[name] += end - start
        if self._sizes[name] > self._limits[name]:
            raise ApiError(413, "too_large", f"{name} must have at most {self._limits[name]} bytes", param=name)
        if name == self._file_part:
            self._file.write(memoryview(data)[start:end])
        else:
            self._fields[name] += data[start:end]

    def _on_end(self) -> None:
        self._is_complete = True
