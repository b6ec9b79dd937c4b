"""What clients see of Ray's proxy: one request id, and our error where Ray answers in its own words."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.ray_serve.edge import LostReplica, OneRequestId
from support.servers.waiting import wait_until


def asked(app: ASGIApp) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            return await client.get("http://ray/v1/models")

    return asyncio.run(ask())


@contextmanager
def running_app(app: ASGIApp) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def proxied(response: Response) -> httpx.Response:
    return asked(LostReplica(response))


def test_a_lost_replicas_answer_is_ours_with_the_same_request_id() -> None:
    for status in (500, 503):
        answer = proxied(PlainTextResponse("Internal Server Error", status, {"x-request-id": "r-1"}))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
        assert (answer.headers["retry-after"], answer.headers["x-request-id"]) == ("1", "r-1")
        assert answer.headers["x-should-retry"] == "true"


def test_a_proxy_that_begins_no_answer_is_a_lost_replica_too() -> None:
    """As Ray's is if the replica dies in the request: asked through uvicorn, which would write a plain 500."""

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        """Returns without a word."""

    with running_app(silent) as plain, running_app(LostReplica(silent)) as wrapped:
        assert httpx.get(plain).text == "Internal Server Error"
        answer = httpx.get(wrapped)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
    assert answer.headers["retry-after"] == "1"


def test_what_the_app_answers_passes_unchanged() -> None:
    for response in (JSONResponse({"error": {"code": "internal_error"}}, 500), PlainTextResponse("# HELP", 200)):
        answer = proxied(response)
        assert (answer.status_code, answer.content) == (response.status_code, response.body)


def test_a_stream_passes_piece_by_piece() -> None:
    pieces: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"a", b"b", b""):
            await send({"type": "http.response.body", "body": piece, "more_body": piece != b""})

    async def send(message: object) -> None:
        assert isinstance(message, dict)
        pieces.append(message.get("body", b"start"))

    asyncio.run(LostReplica(app)({"type": "http"}, None, send))  # type: ignore[arg-type]
    assert pieces == [b"start", b"a", b"b", b""]


def test_the_apps_own_request_id_makes_room_for_rays() -> None:
    answer = asked(OneRequestId(JSONResponse({}, headers={"x-request-id": "r-1", "x-other": "kept"})))
    assert "x-request-id" not in answer.headers
    assert answer.headers["x-other"] == "kept"
