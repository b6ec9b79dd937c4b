"""The line of each answer: what it says, in both formats, and the request's id on everything said on its behalf."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from transformers.utils import logging as transformers_logging

from server.api.edge import request_context as request_log
from server.cli.common.logging_setup import set_up_logging
from support.servers.waiting import wait_until
from support.worlds.fake_engine import FakeEngine

ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 4}


@pytest.fixture(params=("text", "json"))
def log(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is written to stderr, as `serve` sets it up."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr("sys.stderr", stream)
    set_up_logging(log_format=request.param)
    stream.format = request.param  # type: ignore[attr-defined]
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def line_of(log: io.StringIO, request_id: str) -> str:
    def lines() -> list[str]:
        return [line for line in log.getvalue().splitlines() if request_id in line and "access" in line]

    wait_until(lines)
    [line] = lines()
    return line


def test_an_answer_has_one_line_that_says_who_what_and_how_long(client: httpx.Client, log: io.StringIO) -> None:
    client.post("/v1/completions", json=ASK, headers={"x-request-id": "my-own-id"}).raise_for_status()
    line = line_of(log, "my-own-id")
    if log.format == "text":  # type: ignore[attr-defined]
        assert "[my-own-id]: POST /v1/completions 200 " in line
        assert " tenant=acme adapter=base " in line
        assert " completion_tokens=4 " in line
        return
    fields = json.loads(line)
    assert (fields["request_id"], fields["method"], fields["status"]) == ("my-own-id", "POST", 200)
    assert (fields["tenant"], fields["adapter"], fields["completion_tokens"]) == ("acme", "base", 4)
    assert 0 < fields["ttft_ms"] <= fields["ms"]
    assert "error" not in fields


def test_what_transformers_logs_has_the_same_format(log: io.StringIO) -> None:
    transformers_logging.get_logger("transformers.a_module").warning("left out")
    transformers_logging.get_logger("transformers.a_module").error("a fault of a file")
    [line] = log.getvalue().splitlines()
    assert "a fault of a file" in line
    if log.format == "json":  # type: ignore[attr-defined]
        assert json.loads(line)["logger"] == "transformers.a_module"


def test_a_refused_request_has_its_line_too(client: httpx.Client, log: io.StringIO) -> None:
    client.get("/v1/models/none", headers={"x-request-id": "refused"})
    assert "404" in line_of(log, "refused")


def test_a_secret_in_a_path_or_a_header_is_not_logged(client: httpx.Client, log: io.StringIO) -> None:
    key = client.headers["authorization"].split()[1]
    client.get(f"/v1/models/{key}?key={key}", headers={"x-request-id": "careless"})
    line_of(log, "careless")
    assert key not in log.getvalue()


def test_probes_are_quiet(client: httpx.Client, log: io.StringIO) -> None:
    for path in ("/health", "/ready", "/metrics"):
        client.get(path, headers={"x-request-id": "probe"})
    client.get("/v1/models", headers={"x-request-id": "last"})
    line_of(log, "last")
    assert "probe" not in log.getvalue()


def test_a_fault_of_ours_is_logged_with_the_requests_id(
    client: httpx.Client, log: io.StringIO, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(fake_engine, "submit", broken)
    assert client.post("/v1/completions", json=ASK, headers={"x-request-id": "faulty"}).status_code == 500
    line_of(log, "faulty")
    said = [line for line in log.getvalue().splitlines() if "faulty" in line]
    assert len(said) >= 2
    assert "ZeroDivisionError" in log.getvalue()


def test_outside_a_request_there_is_no_id(log: io.StringIO) -> None:
    logging.getLogger("server.elsewhere").info("hello")
    line = log.getvalue().splitlines()[-1]
    assert ("[-]: hello" in line) if log.format == "text" else json.loads(line)["request_id"] == "-"  # type: ignore[attr-defined]


def test_a_requests_line_costs_no_more_than_a_few_plain_ones(log: io.StringIO) -> None:
    """Beside plain lines through the same handler, in the same run: however busy the machine is."""

    def request_line(index: int) -> None:
        request_log.begin(f"r{index}")
        request_log.note(tenant="acme", adapter="law@3", prompt_tokens=5, completion_tokens=7)
        request_log.end(method="POST", route="/v1/completions", status=200, duration_s=0.1)

    def plain_line(index: int) -> None:
        logging.getLogger("server.api.access").info("POST /v1/completions 200 %d ms", index)

    def best_s(write: Callable[[int], None]) -> float:
        times = []
        for _ in range(5):
            start_s = time.thread_time()
            for index in range(200):
                write(index)
            times.append(time.thread_time() - start_s)
        return min(times)

    assert best_s(request_line) < 10 * best_s(plain_line)
