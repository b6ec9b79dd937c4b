"""One streamed completion over HTTP, timed as its pieces arrive. The same client for every server, on plain sockets so
that it takes little of the cores that are measured."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PATIENCE_S = 600.0
EVENT = b"data: "
END = b"data: [DONE]"


@dataclass(frozen=True, slots=True)
class Ask:
    """A greedy completion of token ids to exactly `new` tokens. fields: what chooses an adapter on this server."""

    url: str
    prompt: list[int]
    new: int
    fields: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """Moments of time.perf_counter(): the request sent, and each piece of the stream that held events with text."""

    sent_s: float
    pieces_s: list[float]
    num_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.pieces_s[0] - self.sent_s

    @property
    def token_s(self) -> float:
        """Seconds of a token after the first, on average: a server may hold back a token that ends within a character,
        so gaps between pieces say less."""
        return (self.pieces_s[-1] - self.pieces_s[0]) / max(1, self.num_tokens - 1)


def complete(ask: Ask) -> Answer:
    """Raises RuntimeError if the server refuses, or answers another number of tokens."""
    parts = urlsplit(ask.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=PATIENCE_S)
    body = {
        "prompt": ask.prompt,
        "max_tokens": ask.new,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **ask.fields,
    }
    sent_s = time.perf_counter()
    try:
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json", **ask.headers}
        )
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise RuntimeError(f"{ask.url} answered {response.status}: {response.read(500)!r}")
        pieces_s, text = _read(response)
    finally:
        connection.close()
    count = _completion_tokens(text)
    if count != ask.new or not pieces_s:
        raise RuntimeError(f"{ask.url} answered {count} tokens, asked for {ask.new}: {text[-300:]!r}")
    return Answer(sent_s, pieces_s, count)


def _read(response: http.client.HTTPResponse) -> tuple[list[float], bytes]:
    """Moments of pieces with events, but for those that hold only the usage and the end; and all bytes."""
    pieces_s: list[float] = []
    text = b""
    while piece := response.read1(65536):
        if EVENT in piece and b'"text":' in piece:
            pieces_s.append(time.perf_counter())
        text += piece
    return pieces_s, text


def _completion_tokens(text: bytes) -> int:
    """As the last event with a usage says."""
    for line in reversed(text.splitlines()):
        if line.startswith(EVENT) and line != END and (usage := json.loads(line[len(EVENT) :]).get("usage")):
            return int(usage["completion_tokens"])
    return 0
