"""HTTP by hand over a socket, for what no client library would send."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RawResponse:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


@contextmanager
def dial(
    url: str, *, timeout_s: float = 600.0, receive_buffer_bytes: int | None = None, source: str | None = None
) -> Iterator[socket.socket]:
    """source: the local address to come from."""
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        if receive_buffer_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        if source is not None:
            connection.bind((source, 0))
        connection.settimeout(timeout_s)
        connection.connect((host, int(port)))
        yield connection


def head(method: str, path: str, *, key: str | None = None, **headers: str) -> bytes:
    """A request's head. Header names are given with underscores."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def json_request(path: str, body: dict[str, Any], *, key: str | None = None) -> bytes:
    data = json.dumps(body).encode()
    return head("POST", path, key=key, Content_Type="application/json", Content_Length=str(len(data))) + data


def read_response(connection: socket.socket) -> RawResponse:
    """One response with a content-length. Raises ConnectionError where none comes."""
    stream = connection.makefile("rb")
    status_line = stream.readline()
    if not status_line:
        raise ConnectionError("the server closed the connection without an answer")
    response = RawResponse(int(status_line.split()[1]))
    while line := stream.readline().strip():
        name, _, value = line.decode("latin-1").partition(":")
        response.headers[name.lower()] = value.strip()
    response.body = stream.read(int(response.headers.get("content-length", "0")))
    return response
