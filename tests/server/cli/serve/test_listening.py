"""The socket and the HTTP thread, with a real API over an engine that stalls when told."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.edge.connections.server import BoundedServer
from server.api.settings import ApiSettings
from server.cli.common.failures import CommandError, failure_of
from server.cli.common.listening import bound, url_of
from server.cli.common.stop_signals import StopSignals
from server.cli.serve.http_server import HttpServer
from server.cli.serve.run import http_server
from server.engine.text.tokenizer import Tokenizer
from support.models.adapter_files import tiny_base
from support.models.tokenizer_zoo import byte_level, wrapped
from support.servers.waiting import wait_until
from support.worlds.fake_engine import FakeEngine

HOST = "127.0.0.1"


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine(tiny_base(), Tokenizer(wrapped(byte_level()))) as engine:
        yield engine


@pytest.fixture
def app(engine: FakeEngine, tmp_path: Path) -> Iterator[FastAPI]:
    store = AdapterStore.open(tmp_path)
    yield create_app(engine=engine, store=store, settings=ApiSettings(data_dir=tmp_path, auth="off"))
    store.close()


class Stream:
    """A streamed answer of which one piece has come; the engine stalls then."""

    def __init__(self, engine: FakeEngine, url: str) -> None:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 50, "ignore_eos": True, "stream": True}
        self._stack = ExitStack()
        engine.stalls_at = engine.num_steps + 1
        response = self._stack.enter_context(httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300))
        self._lines = response.iter_lines()
        assert next(self._lines).startswith("data: ")

    def rest(self) -> list[str]:
        with self._stack:
            return [line for line in self._lines if line]


def test_nobody_is_let_in_before_it_starts(app: FastAPI) -> None:
    listener = bound(HOST, 0)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url_of(listener)}/health")
    url, server = url_of(listener), HttpServer(app, listener)
    server.start()
    assert httpx.get(f"{url}/health").status_code == 200
    server.stop(StopSignals())
    assert not server.is_alive
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_asked_once_answers_under_way_come_to_their_end(app: FastAPI, engine: FakeEngine) -> None:
    listener = bound(HOST, 0)
    url, server = url_of(listener), HttpServer(app, listener)
    server.start()
    stream = Stream(engine, url)
    threading.Timer(0.5, engine.resume).start()
    start_s = time.monotonic()
    reader = threading.Thread(target=server.stop, args=(StopSignals(),))
    reader.start()
    assert stream.rest()[-1] == "data: [DONE]"
    reader.join()
    assert time.monotonic() - start_s >= 0.5


def test_while_it_drains_it_is_alive_and_not_ready_and_lets_nobody_in(app: FastAPI, engine: FakeEngine) -> None:
    listener = bound(HOST, 0)
    url, server = url_of(listener), HttpServer(app, listener)
    server.start()
    assert httpx.get(f"{url}/ready").status_code == 200
    stream = Stream(engine, url)
    stopping = threading.Thread(target=server.stop, args=(StopSignals(),))
    stopping.start()
    wait_until(lambda: httpx.get(f"{url}/ready").status_code == 503)
    assert httpx.get(f"{url}/health").status_code == 200
    refused = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
    assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
    engine.resume()
    assert stream.rest()[-1] == "data: [DONE]"
    stopping.join()


def test_at_the_deadline_a_stream_ends_with_an_error_event_and_a_whole_answer_with_503(
    app: FastAPI, engine: FakeEngine
) -> None:
    listener = bound(HOST, 0)
    url, server = url_of(listener), HttpServer(app, listener, drain_s=0.3)
    server.start()
    stream = Stream(engine, url)
    answers: list[httpx.Response] = []
    body = {"model": "tiny", "prompt": "x", "max_tokens": 50, "ignore_eos": True}
    asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body)))
    asking.start()
    wait_until(lambda: engine.stats().num_running == 2)
    start_s = time.monotonic()
    server.stop(StopSignals())
    assert time.monotonic() - start_s >= 0.3
    *_, error, done = stream.rest()
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "server_stopping"
    assert done == "data: [DONE]"
    asking.join()
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "server_stopping")
    assert len(engine.aborted) == 2
    engine.resume()


def test_asked_twice_they_are_cut_off(app: FastAPI, engine: FakeEngine) -> None:
    listener = bound(HOST, 0)
    url, server = url_of(listener), HttpServer(app, listener, drain_s=3600)
    server.start()
    stream = Stream(engine, url)
    signals = StopSignals()
    signals.count = 2
    start_s = time.monotonic()
    server.stop(signals)
    assert time.monotonic() - start_s < 600  # not the 3,600 s of the drain
    with pytest.raises(httpx.RemoteProtocolError):
        stream.rest()
    engine.resume()


def test_a_signal_while_the_thread_starts_ends_it(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    started = BoundedServer.startup

    async def signalled(server: BoundedServer, sockets: Any = None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.2)
        await started(server, sockets)

    monkeypatch.setattr(BoundedServer, "startup", signalled)
    with StopSignals() as signals, http_server(app, bound(HOST, 0), signals):
        pytest.fail("it serves although it was asked to stop")
    assert signals.asked
    assert "http" not in {thread.name for thread in threading.enumerate()}


def test_a_port_that_another_server_took_while_we_loaded_is_told_so(app: FastAPI) -> None:
    """Linux lets two sockets have a port as long as neither listens."""
    first = bound(HOST, 0)
    port = first.getsockname()[1]
    with bound(HOST, port) as second:
        first.listen()
        with pytest.raises(CommandError) as caught:
            HttpServer(app, second).start()
    first.close()
    assert caught.value.code == "port_in_use"
    assert str(port) in caught.value.message


def test_a_port_in_use_is_told_with_its_number(busy_port: int) -> None:
    with pytest.raises(CommandError, match=f"{HOST}:{busy_port} is in use") as caught:
        bound(HOST, busy_port)
    assert caught.value.code == "port_in_use"


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]")])
def test_the_url_is_one_that_a_client_here_can_use(host: str, shown: str) -> None:
    try:
        listener = bound(host, 0)
    except OSError as error:
        pytest.skip(f"{host}: {error.strerror}")
    with listener:
        assert url_of(listener) == f"http://{shown}:{listener.getsockname()[1]}"


@pytest.mark.parametrize("host", ["a" * 64, "a..b", "no-such-host.invalid"])
def test_a_host_that_is_none_is_named(host: str) -> None:
    with pytest.raises(CommandError, match=f"--host {host}: ") as caught:
        bound(host, 0)
    assert caught.value.code == "bad_host"


def test_an_address_that_the_system_forbids_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", forbidden)  # as of port 80, unless the tests run as root
    with pytest.raises(PermissionError) as caught:
        bound(HOST, 80)
    assert failure_of(caught.value).line == "permission_denied: 127.0.0.1:80: Permission denied"
