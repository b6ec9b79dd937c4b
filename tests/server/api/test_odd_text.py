"""A NUL, which PostgreSQL stores in no text, and half a character, which no database stores, wherever a request may
hold them: refused or not found, never 500."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from adapters_store.errors import InputRefused, NotFound
from adapters_store.store import AdapterStore
from server.jobs.served_base import ServedBase
from support.servers import postgres

CHATS = b"".join(
    b'{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "Yes."}]}\n' % number
    for number in range(20)
)

ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 1}
LINE = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": ASKED}).encode()


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.PostgresServer]:
    with postgres.server() as server:
        yield server


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: postgres.PostgresServer
) -> Iterator[AdapterStore]:
    url = server.url if request.param == "postgresql" else None
    store = AdapterStore.open(tmp_path_factory.mktemp("odd"), database_url=url)
    yield store
    store.close()


@pytest.fixture(scope="module")
def routes(app: FastAPI) -> list[tuple[str, APIRoute]]:
    return [(method, route) for route in app.routes if isinstance(route, APIRoute) for method in sorted(route.methods)]


@pytest.mark.parametrize("odd", ["%00", "a%00b", "%ED%A0%80", "a%ED%A0%80b"])
def test_in_every_path_and_query(
    routes: list[tuple[str, APIRoute]], client: httpx.Client, admin: httpx.Client, odd: str
) -> None:
    """U+D800, half a character, in UTF-8's manner is no UTF-8: it is read as U+FFFD."""
    for method, route in routes:
        odd_path, path = (re.sub(r"\{\w+(:path)?\}", value, route.path) for value in (odd, "acme"))
        names = [field.alias for field in route.dependant.query_params]
        for asked in {odd_path, *(f"{path}?{name}={odd}" for name in names)}:
            for own in (client, admin):
                answer = own.request(method, asked)
                assert answer.status_code < 500, (method, asked, answer.text)
                if "%00" in asked:
                    error = answer.json()["error"]
                    said = (answer.status_code, error["code"], error["param"])
                    if asked is odd_path:
                        assert said == (404, "not_found", None)
                    else:
                        param = asked.partition("?")[2].partition("=")[0]
                        assert said == (400, "invalid_value", param)
                        assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize("odd", ["\0", "a\0b", "\ud800", "a\ud800b"])
def test_in_bodies(app: FastAPI, client: httpx.Client, admin: httpx.Client, tmp_path: Path, odd: str) -> None:
    """A refusal names the field. With the odd text in no field, each of these requests is a good one."""
    app.state.onboarding.jobs.bases.remember(ServedBase(path=tmp_path, name="tiny", digest="sha256:b"))
    chats, lines = (
        client.post("/v1/files", data={"purpose": purpose}, files={"file": ("d.jsonl", content)}).json()["id"]
        for purpose, content in (("fine-tune", CHATS), ("batch", LINE))
    )
    job = {"model": "tiny", "training_file": chats}
    batch = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "input_file_id": lines}
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for own, path, body in (
        (admin, "/admin/tenants", {"name": odd}),
        (admin, "/admin/tenants/acme/keys", {"label": odd}),
        (admin, "/admin/tenants/acme/keys", {"scopes": [odd]}),
        *((client, "/v1/fine_tuning/jobs", {**job, name: odd}) for name in (*job, "suffix", "validation_file")),
        (client, "/v1/fine_tuning/jobs", {**job, "metadata": {"key": odd}}),
        (client, "/v1/fine_tuning/jobs", {**job, "metadata": {odd: "value"}}),
        (client, "/v1/fine_tuning/jobs", {**job, "multilora": {"mix_file": odd}}),
        (client, "/v1/fine_tuning/jobs", {**job, "multilora": {odd: 1}}),
        *((client, "/v1/batches", {**batch, name: odd}) for name in batch),
        (client, "/v1/batches", {**batch, "metadata": {"key": odd}}),
        (client, "/v1/batches", {**batch, "metadata": {odd: "value"}}),
        (client, "/v1/adapters/law/canary", {odd: odd, "percent": 5}),
        (client, "/v1/completions", {"model": odd, "prompt": "x"}),
        (client, "/v1/embeddings", {"model": odd, "input": "x"}),
        (client, "/v1/chat/completions", {"model": odd, **chat}),
        (client, "/v1/chat/completions", {"model": "tiny", "user": odd, "max_tokens": 1, **chat}),
        (client, "/v1/responses", {"model": odd, "input": "x"}),
        (client, "/v1/messages", {"model": odd, "max_tokens": 1, **chat}),
        (client, "/v1/completions", {"model": [{"name": odd, "weight": 1.0}], "prompt": "x"}),
    ):
        answer = own.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert_names_a_field(answer, path, body)
    for path, fields, files in (
        ("/v1/files", {"purpose": odd}, {"file": ("d.jsonl", CHATS)}),
        ("/v1/files", {"purpose": "fine-tune"}, {"file": (odd.replace("\ud800", "\ufffd"), CHATS)}),
        ("/v1/adapters", {"name": odd}, {"config": b"{}", "weights": b""}),
        ("/v1/adapters", {"name": "law", "tool_dialect": odd}, {"config": b"{}", "weights": b""}),
    ):
        raw = {name: value.encode(errors="surrogatepass") for name, value in fields.items()}
        assert_names_a_field(client.post(path, data=raw, files=files), path, fields)


def assert_names_a_field(answer: httpx.Response, path: str, asked: object) -> None:
    said = (path, asked, answer.status_code, answer.text)
    assert answer.status_code < 500, said
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["param"] or error["message"].startswith("the body: "), said


@pytest.mark.parametrize("odd", ["\0", "\ud800"])
def test_from_a_command_that_asks_the_store_itself(store: AdapterStore, odd: str) -> None:
    for ask in (
        lambda: store.audit.entries(tenant=odd, limit=1),
        lambda: store.usage.rows(tenant=odd),
        lambda: store.tenants.get(odd),
        lambda: store.list_versions(odd),
    ):
        with suppress(InputRefused, NotFound):
            assert not ask()
