"""The server over both event loops: asyncio's own, which it chooses, and uvloop, which an environment may bring."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import uvloop
from fastapi import FastAPI

from server.api.edge.connections.server import ListenSettings, build_server
from support.servers.live_server import LOOPS, Loop, serving
from support.servers.raw_http import dial, head, read_response

ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module", params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Loop:
    name: Loop = request.param
    return name


@pytest.fixture(scope="module")
def url(app: FastAPI, loop: Loop) -> Iterator[str]:
    with serving(app, loop=loop) as url:
        yield url


def test_the_server_runs_on_the_loop_that_it_is_given(app: FastAPI, loop: Loop) -> None:
    factory = build_server(app, app.state.context.settings, ListenSettings(loop=loop)).config.get_loop_factory()
    assert factory is not None
    made = factory()
    made.close()
    assert isinstance(made, uvloop.Loop) == (loop == "uvloop")


def test_an_environment_does_not_choose_the_loop(app: FastAPI) -> None:
    """uvicorn's own default takes uvloop wherever it is installed."""
    assert (
        build_server(app, app.state.context.settings, ListenSettings()).config.get_loop_factory()
        is asyncio.SelectorEventLoop
    )


def test_plain_and_streamed_answers_come(url: str, keys: dict[str, str]) -> None:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {keys['acme']}"}, timeout=300) as client:
        for _ in range(3):  # on one connection
            whole = client.post("/v1/completions", json=ASK)
            assert whole.status_code == 200, whole.text
        streamed = client.post("/v1/completions", json={**ASK, "stream": True})
        assert streamed.text.endswith("data: [DONE]\n\n")


def test_an_upload_comes_whole(url: str, keys: dict[str, str], loop: Loop, upload: object) -> None:
    assert callable(upload)
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {keys['acme']}"}, timeout=300) as client:
        assert upload(client, f"over-{loop}").status_code == 201


def test_answers_are_sent_at_once(url: str) -> None:
    """Nagle's algorithm is off on the sockets of the server; with it, a small answer waits up to 40 ms."""
    with dial(url) as client:
        client.sendall(head("GET", "/health"))
        assert read_response(client).status == 200
        ours, theirs = client.getsockname(), client.getpeername()
        with socket_of_this_process(theirs, ours) as server_end:
            assert server_end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def socket_of_this_process(address: object, peer: object) -> socket.socket:
    """A second handle of the socket with these ends; raises LookupError."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # a file, a socket without a peer, or closed meanwhile
            found = socket.socket(fileno=os.dup(int(entry.name)))
            if (found.getsockname(), found.getpeername()) == (address, peer):
                return found
            found.close()
    raise LookupError(f"no socket from {address} to {peer}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_library_that_made_uvloop_the_policy_changes_nothing(app: FastAPI, keys: dict[str, str]) -> None:
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    try:
        with serving(app) as url:
            key = {"Authorization": f"Bearer {keys['acme']}"}
            assert httpx.post(f"{url}/v1/completions", json=ASK, headers=key, timeout=300).status_code == 200
    finally:
        asyncio.set_event_loop_policy(before)
