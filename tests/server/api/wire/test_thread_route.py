"""Long answers are encoded item by item, on the thread of their route: the event loop does not wait for them."""

from __future__ import annotations

import json
import threading
from inspect import iscoroutinefunction
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.responses import Response

from server.api.wire import thread_route
from server.api.wire.thread_route import ThreadRoute, json_in_pieces


def test_the_answer_is_json_whatever_it_holds() -> None:
    answer = {"object": "list", "data": [{"id": 'ü"\n'}, {"loss": float("nan")}], "none": [], "nested": {"a": [1, 2]}}
    shown = json_in_pieces(answer)
    assert json.loads(shown) == {**answer, "data": [{"id": 'ü"\n'}, {"loss": None}]}
    assert b" " not in shown
    assert json_in_pieces({}) == b"{}"


def test_no_call_into_the_encoder_gets_a_whole_list(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    encode = thread_route.to_json

    def watched(value: Any, **options: Any) -> bytes:
        seen.append(value)
        return encode(value, **options)

    monkeypatch.setattr(thread_route, "to_json", watched)
    json_in_pieces({"data": [{"id": str(index)} for index in range(5000)], "has_more": False})
    assert not any(isinstance(value, list) for value in seen)
    assert len(seen) == 2 + 1 + 5000


def test_every_plain_function_of_the_api_answers_so(app: FastAPI) -> None:
    routes = [route for route in app.routes if isinstance(route, APIRoute) and not iscoroutinefunction(route.endpoint)]
    assert len(routes) > 20
    assert [route.path for route in routes if not isinstance(route, ThreadRoute)] == []


def test_nothing_is_encoded_on_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, client: httpx.Client, admin: httpx.Client
) -> None:
    threads: set[str] = set()
    encode = thread_route.json_in_pieces

    def watched(answer: dict[str, Any]) -> bytes:
        threads.add(threading.current_thread().name)
        return encode(answer)

    monkeypatch.setattr(thread_route, "json_in_pieces", watched)
    for path in ("/v1/adapters", "/v1/models", "/v1/models/tiny", "/v1/files", "/v1/usage", "/v1/fine_tuning/jobs"):
        assert client.get(path).status_code == 200, path
    assert admin.get("/admin/tenants").json()["object"] == "list"
    assert threads
    assert "live-server" not in threads  # the thread of the event loop


def test_a_routes_own_response_and_status_are_kept() -> None:
    def made() -> dict[str, Any]:
        return {"id": "x"}

    def own() -> Response:
        return Response(b"own", 202)

    assert ThreadRoute("/made", made, status_code=201).endpoint().status_code == 201
    assert ThreadRoute("/made", made).endpoint().status_code == 200
    assert ThreadRoute("/own", own).endpoint().body == b"own"
