"""The app as a whole: it needs no lifespan and no socket, and no input makes it fail."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.engine_client import EngineClient
from server.api.generation.schemas import ChatBody, CompletionBody
from server.api.settings import ApiSettings

SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([10**9, 2**70, 0.5, 1e308, -1.0])
TEXTS = st.sampled_from(["", "tiny", "hello", "user", "text", "none", "\ud800", "x" * 600])
VALUES = st.recursive(
    SCALARS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.sampled_from(["role", "content"]), inner),
    max_leaves=6,
)


def test_the_app_answers_without_a_socket_or_a_lifespan(app: FastAPI, keys: dict[str, str]) -> None:
    async def scenario() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        headers = {"Authorization": f"Bearer {keys['acme']}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://app", headers=headers) as client:
            body = {"model": "tiny", "prompt": "hello", "max_tokens": 3, "stream": True}
            return await client.post("/v1/completions", json=body)

    for _ in range(2):  # each in an event loop of its own
        response = asyncio.run(scenario())
        assert response.status_code == 200
        assert response.text.endswith("data: [DONE]\n\n")


def test_two_admin_keys_open_while_one_replaces_the_other(
    engine: EngineClient, store: AdapterStore, data_dir: Path
) -> None:
    keys = ("the-new-admin-key", "the-old-admin-key")
    own = create_app(engine=engine, store=store, settings=ApiSettings(data_dir=data_dir, admin_keys=keys))

    async def ask(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(own), base_url="http://app") as client:
            return (await client.get("/admin/audit", headers=headers)).status_code

    assert [asyncio.run(ask(key)) for key in (*keys, "another-admin-key")] == [200, 200, 401]


@pytest.mark.parametrize(
    ("path", "schema", "good"),
    [
        ("/v1/completions", CompletionBody, {"model": "tiny", "prompt": "hello"}),
        ("/v1/chat/completions", ChatBody, {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}),
    ],
)
@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_of_any_field_makes_the_server_fail(
    client: httpx.Client, path: str, schema: Any, good: dict[str, Any], data: st.DataObject
) -> None:
    fields = st.dictionaries(st.sampled_from(sorted(schema.model_fields)), VALUES, min_size=1, max_size=2)
    body = {**good, "max_tokens": 2, **data.draw(fields)}
    response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code != 200:
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}


@given(body=st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_makes_the_server_fail(client: httpx.Client, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400


def test_import_starts_nothing_and_loads_no_server() -> None:
    code = (
        "import threading, sys, server.api.app\n"
        "assert threading.active_count() == 1\n"
        "assert 'uvicorn' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auth": "maybe"}, "auth"),
        ({"max_choices": 0}, "max_choices"),
        ({"admin_keys": ("short",)}, "16 characters"),
        *(
            ({"sse_keep_alive_s": short}, "sse_keep_alive_s must be")
            for short in (0.001, 0.999, -1.0, float("nan"), 3601)
        ),
    ],
)
def test_settings_are_checked_once_at_the_start(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ApiSettings(data_dir=Path(), **changes)


@pytest.mark.parametrize("seconds", [0, 1, 15.5, 3600])
def test_a_keep_alive_of_a_second_or_more_or_none_at_all_is_taken(seconds: float) -> None:
    assert ApiSettings(data_dir=Path(), sse_keep_alive_s=seconds).sse_keep_alive_s == seconds


def test_settings_do_not_show_admin_keys() -> None:
    assert "a-very-secret-key" not in repr(ApiSettings(data_dir=Path(), admin_keys=("a-very-secret-key",)))
