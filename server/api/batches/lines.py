"""The input file of a batch: one request a line, checked before the batch is made. Knows no database and no engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapters_store.parsing.strict_json import shown
from server.api.wire.json_text import MalformedJson, json_bytes, parse_json
from server.jobs.limits import JobRefused

MAX_ID_CHARS = 512
_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class Line:
    """One request. body: as its route gets it."""

    custom_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Span:
    """Where a line is in the file, in bytes."""

    start: int
    num_bytes: int


def spans_of(path: Path, max_bytes: int | None = None) -> Iterator[Span]:
    """Every line that is not blank. A longer one than `max_bytes` comes in parts, the first a byte too long.

    None: a file that has been checked already.
    """
    at_most = -1 if max_bytes is None else max_bytes + 1
    with path.open("rb") as file:
        start = 0
        while line := file.readline(at_most):
            if line.strip():
                yield Span(start, len(line))
            start += len(line)


def check_lines(path: Path, endpoint: str, *, max_lines: int, max_bytes: int) -> int:
    """The number of requests. Raises JobRefused (invalid_batch_file, too_many_lines), which names the line."""
    seen: set[bytes] = set()
    count = 0
    with path.open("rb") as file:
        for count, span in enumerate(spans_of(path, max_bytes), 1):
            if count > max_lines:
                raise _refused(count, f"a batch has at most {max_lines} requests", code="too_many_lines")
            if span.num_bytes > max_bytes:
                raise _refused(count, f"must have at most {max_bytes} bytes")
            custom_id = read_line(file, span, number=count, endpoint=endpoint).custom_id
            digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if digest in seen:
                raise _refused(count, f"custom_id {shown(custom_id)} is that of an earlier line")
            seen.add(digest)
    if not count:
        raise JobRefused("invalid_batch_file", "input_file_id: the file holds no request", param="input_file_id")
    return count


def read_line(file: BinaryIO, span: Span, *, number: int, endpoint: str) -> Line:
    """number: of the line, from 1, for refusals. Raises JobRefused (invalid_batch_file)."""
    file.seek(span.start)
    try:
        value = parse_json(file.read(span.num_bytes))
        if isinstance(value, dict):
            _check_fields(value, number, endpoint)
            return Line(value["custom_id"], json_bytes(value["body"]))
    except MalformedJson as error:
        raise _refused(number, str(error).replace("the body", "it", 1)) from None
    except ValueError:  # 1e999
        raise _refused(number, "body: a number is too large") from None
    raise _refused(number, "must be a JSON object")


def _check_fields(value: dict[str, Any], number: int, endpoint: str) -> None:
    unknown = next((name for name in value if name not in _FIELDS), None)
    if unknown is not None:
        raise _refused(number, f"unknown field {shown(unknown)}")
    custom_id, body = value.get("custom_id"), value.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        raise _refused(number, f"custom_id must be a text of 1 to {MAX_ID_CHARS} characters, got {shown(custom_id)}")
    if value.get("method") != "POST":
        raise _refused(number, f"method must be 'POST', got {shown(value.get('method'))}")
    if value.get("url") != endpoint:
        raise _refused(number, f"url must be the batch's endpoint {endpoint!r}, got {shown(value.get('url'))}")
    if not isinstance(body, dict):
        raise _refused(number, "body must be a JSON object")
    if body.get("stream"):
        raise _refused(number, "body: stream must be false, since a batch has whole answers only")


def _refused(number: int, message: str, *, code: str = "invalid_batch_file") -> JobRefused:
    return JobRefused(code, f"input_file_id: line {number}: {message}", param="input_file_id")
