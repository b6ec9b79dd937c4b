"""Bounds on headers, bodies, time and connections, each reached through a real socket."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.engine_client import EngineClient
from server.api.settings import ApiSettings
from support.servers.live_server import LOOPS, serving
from support.servers.raw_http import dial, head, json_request, read_response
from support.servers.waiting import wait_until

ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 1}


@pytest.fixture(scope="module")
def settings(data_dir: Path) -> ApiSettings:
    return ApiSettings(
        data_dir=data_dir,
        auth="off",
        max_body_bytes=10_000,
        max_header_bytes=8_000,
        max_header_count=30,
        max_target_bytes=1_000,
        max_connections=12,
        max_connections_per_address=11,
        header_timeout_s=600,
        body_timeout_s=600,
        idle_timeout_s=600,
        write_timeout_s=0.3,
    )


@pytest.fixture(scope="module", params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def url(app: FastAPI, loop: str) -> Iterator[str]:
    with serving(app, loop=loop) as url:
        yield url


@pytest.fixture(scope="module")
def hasty(engine: EngineClient, store: AdapterStore, settings: ApiSettings, loop: str) -> Iterator[str]:
    """The URL of a server that waits for nothing longer than its time-outs."""
    timeouts = {"header_timeout_s": 1.0, "body_timeout_s": 1.5, "idle_timeout_s": 1.0}
    hasty_app = create_app(engine=engine, store=store, settings=replace(settings, **timeouts))
    with serving(hasty_app, loop=loop) as url:
        yield url


def post_head(length: int | None, **headers: str) -> bytes:
    own = {"Content_Length": str(length)} if length is not None else {"Transfer_Encoding": "chunked"}
    return head("POST", "/v1/completions", Content_Type="application/json", **own, **headers)


def health_status(url: str, source: str) -> int:
    with dial(url, source=source) as connection:
        connection.sendall(head("GET", "/health"))
        return read_response(connection).status


def is_closed(connection: socket.socket) -> bool:
    return connection.recv(1) == b""


def test_a_request_within_all_bounds_is_answered(url: str) -> None:
    with dial(url) as connection:
        connection.sendall(json_request("/v1/completions", ASK))
        assert read_response(connection).status == 200


def test_a_body_declared_too_long_is_a_413_before_it_comes(url: str) -> None:
    with dial(url) as connection:
        connection.sendall(post_head(10_001))
        response = read_response(connection)
    assert (response.status, response.error["code"]) == (413, "too_large")
    assert "10000" in response.error["message"]
    assert response.headers["x-request-id"]


def test_a_chunked_body_is_a_413_as_soon_as_it_is_too_long(url: str) -> None:
    with dial(url) as connection:
        connection.sendall(post_head(None))
        for _ in range(3):
            connection.sendall(b"fa0\r\n" + b" " * 4000 + b"\r\n")
        assert read_response(connection).status == 413


def test_headers_too_large_in_one_piece_are_a_431(url: str) -> None:
    with dial(url) as connection:
        connection.sendall(post_head(2, X_Long="x" * 9_000) + b"{}")
        response = read_response(connection)
    assert (response.status, response.error["code"]) == (431, "headers_too_large")


def test_headers_that_never_end_are_a_431(url: str) -> None:
    with dial(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Endless: ")
        time.sleep(0.02)
        connection.sendall(b"x" * 8_000)
        response = read_response(connection)
        assert response.status == 431
        assert "8000" in response.error["message"]


def test_too_many_headers_are_a_431(url: str) -> None:
    with dial(url) as connection:
        connection.sendall(head("GET", "/health", **{f"X_{index}": "1" for index in range(31)}))
        assert read_response(connection).status == 431


def test_a_long_target_is_a_414(url: str) -> None:
    with dial(url) as connection:
        connection.sendall(head("GET", "/health?" + "x" * 1_000))
        assert read_response(connection).status == 414


def test_a_body_that_pauses_is_a_408_and_the_connection_ends(hasty: str) -> None:
    with dial(hasty) as connection:
        connection.sendall(post_head(100) + b"{")
        response = read_response(connection)
        assert (response.status, response.error["code"]) == (408, "request_timeout")
        assert is_closed(connection)


def test_a_body_that_drips_is_a_408_at_the_deadline(hasty: str) -> None:
    with dial(hasty) as connection:
        connection.sendall(post_head(100))
        for _ in range(5):
            time.sleep(0.25)
            connection.sendall(b" ")
        assert read_response(connection).status == 408


@pytest.mark.parametrize("start", [b"", b"\r\n", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_headers_that_do_not_come_end_the_connection(hasty: str, start: bytes) -> None:
    with dial(hasty) as connection:
        connection.sendall(start)
        assert read_response(connection).status == 408
        assert is_closed(connection)


def test_a_second_request_has_its_own_header_clock(hasty: str) -> None:
    with dial(hasty) as connection:
        for _ in range(8):
            time.sleep(0.15)
            connection.sendall(head("GET", "/health"))
            assert read_response(connection).status == 200
        connection.sendall(b"GET /hea")
        assert read_response(connection).status == 408


def test_the_rest_of_a_refused_body_may_not_come_for_ever(hasty: str) -> None:
    def send_on(connection: socket.socket) -> None:
        for _ in range(100):
            connection.sendall(b"x" * 1_000)
            time.sleep(0.02)

    with dial(hasty) as connection:
        connection.sendall(post_head(9_999_999))
        assert read_response(connection).status == 413
        with pytest.raises(OSError, match=r"reset|pipe"):
            send_on(connection)


def test_a_reader_that_stops_reading_is_cut_off(app: FastAPI) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 16}
    with serving(app, send_buffer_bytes=4096) as url, dial(url, receive_buffer_bytes=4096) as connection:
        connection.sendall(json_request("/v1/completions", body))
        pieces = [connection.recv(1)]
        wait_until(lambda: app.state.context.draining.num_inside == 0)
        while piece := connection.recv(1 << 20):
            pieces.append(piece)
    came = b"".join(pieces)
    assert b"data: " in came
    assert not came.endswith(b"0\r\n\r\n"), "the whole stream came"


def test_one_address_has_its_limit_and_others_still_get_in(url: str) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(dial(url, source="127.0.0.2")) for _ in range(12)]
        for connection in connections[:11]:
            connection.sendall(head("GET", "/health"))
            assert read_response(connection).status == 200
        response = read_response(connections[11])
        assert (response.status, response.error["code"]) == (429, "too_many_connections")
        assert "11" in response.error["message"]
        with dial(url) as other:
            other.sendall(head("GET", "/health"))
            assert read_response(other).status == 200
        connections[0].close()
        wait_until(lambda: health_status(url, source="127.0.0.2") == 200)


def test_connections_beyond_the_limit_get_a_503(url: str) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(dial(url, source=f"127.0.0.{2 + index % 2}")) for index in range(13)]
        for connection in connections[:12]:
            connection.sendall(head("GET", "/health"))
            assert read_response(connection).status == 200
        response = read_response(connections[12])
        assert (response.status, response.headers["retry-after"]) == (503, "1")
        assert response.error["code"] == "too_many_connections"


def test_a_body_may_come_in_pieces(url: str) -> None:
    data = json.dumps(ASK).encode()
    with dial(url) as connection:
        connection.sendall(post_head(len(data)))
        for byte in data:
            connection.sendall(bytes([byte]))
        assert read_response(connection).status == 200
