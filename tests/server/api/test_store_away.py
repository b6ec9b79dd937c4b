"""A server whose database or data directory goes away and comes back: 503 with Retry-After, never 500, never a lie."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store.storage import database
from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.background import background
from server.api.settings import ApiSettings
from server.engine.text.tokenizer import Tokenizer
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base
from support.servers import postgres
from support.servers.held_database import held
from support.servers.live_server import serving
from support.servers.waiting import wait_until
from support.worlds.fake_engine import FakeEngine

ADMIN_KEY = "admin-key-for-tests"
NEVER_OVER_S, OVER_AT_ONCE_S = 3600.0, 0.0


class World:
    """A server with its background, a tenant with the adapter `law`, and what the answers said was used."""

    def __init__(self, url: str, key: str, data_dir: Path) -> None:
        self.client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        self.admin = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60)
        self.data_dir = data_dir
        self.used = 0

    def ask(self, model: str = "law") -> httpx.Response:
        answer = self.client.post("/v1/completions", json={"model": model, "prompt": "Hi", "max_tokens": 3})
        if answer.status_code == 200:
            self.used += answer.json()["usage"]["total_tokens"]
        return answer

    def upload(self, name: str, seed: int = 0) -> httpx.Response:
        weights = safetensors_bytes(lora_tensors(tiny_base(), seed=seed))
        files = {"config": config_bytes(), "weights": weights}
        return self.client.post("/v1/adapters", data={"name": name}, files=files)

    def status_of(self, path: str) -> int:
        return self.client.get(path).status_code


@contextmanager
def world(data_dir: Path, tokenizer: Tokenizer, *, grace_s: float, url: str | None = None) -> Iterator[World]:
    store = AdapterStore.open(data_dir, database_url=url, grace_s=grace_s)
    with ExitStack() as stack:
        stack.callback(store.close)
        engine = stack.enter_context(FakeEngine(tiny_base(), tokenizer))
        key = store.tenants.create("acme").api_key
        app = create_app(engine=engine, store=store, settings=ApiSettings(data_dir=data_dir, admin_keys=(ADMIN_KEY,)))
        stack.enter_context(background(app))
        own = World(stack.enter_context(serving(app)), key, data_dir)
        stack.callback(own.client.close)
        stack.callback(own.admin.close)
        assert own.upload("law").status_code == 201
        assert own.upload("cold", seed=1).status_code == 201
        assert own.ask().status_code == 200
        yield own


@pytest.fixture(scope="module")
def cluster() -> Iterator[postgres.PostgresServer]:
    with postgres.server() as cluster:
        yield cluster


@pytest.fixture
def server(cluster: postgres.PostgresServer) -> postgres.PostgresServer:
    """It runs, whatever the test before has done."""
    if not cluster.is_running():
        cluster.start()
    return cluster


def own_database(server: postgres.PostgresServer, tmp_path: Path) -> str:
    return server.database(f"of_{tmp_path.name.lower()}"[:60])


def assert_comes_back(answer: httpx.Response, code: str = "store_unavailable") -> None:
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == code
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["x-should-retry"] == "true"
    assert "127.0.0.1" not in answer.text
    assert "/" not in answer.json()["error"]["message"]


def test_what_is_known_is_served_while_postgresql_is_away_and_nothing_else(
    tmp_path: Path, tokenizer: Tokenizer, server: postgres.PostgresServer
) -> None:
    with world(tmp_path / "data", tokenizer, grace_s=NEVER_OVER_S, url=own_database(server, tmp_path)) as own:
        base = own.client.get("/v1/models").json()["data"][0]["id"]
        time.sleep(3)  # the server has followed the uploads, and forgotten what it knew before them
        assert own.ask().status_code == own.ask(base).status_code == 200
        server.stop()
        for _ in range(3):  # the remembered answers are looked at again every half second
            assert {own.ask(model).status_code for model in ("law", base)} == {200}
            assert_comes_back(own.ask("cold"))
            time.sleep(0.6)
        for answer in (*(change(own) for change in CHANGES.values()), own.client.get("/v1/adapters")):
            assert_comes_back(answer)
        assert [own.status_of(path) for path in ("/ready", "/health", "/metrics")] == [200] * 3
        server.start()
        wait_until(lambda: own.ask("cold").status_code == 200)
        assert own.upload("new").status_code == 201
        wait_until(lambda: used(own) == own.used)


def used(own: World) -> int:
    rows = own.client.get("/v1/usage").json()["data"]
    return sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)


def test_after_the_grace_all_is_503_and_ready_is_red_until_postgresql_is_back(
    tmp_path: Path, tokenizer: Tokenizer, server: postgres.PostgresServer
) -> None:
    with world(tmp_path / "data", tokenizer, grace_s=OVER_AT_ONCE_S, url=own_database(server, tmp_path)) as own:
        server.stop()
        wait_until(lambda: own.status_of("/ready") == 503)
        assert_comes_back(own.client.get("/ready"))
        wait_until(lambda: own.ask().status_code != 200)
        seen = [own.ask() for _ in range(20)]
        for answer in seen:
            assert_comes_back(answer)
        assert own.status_of("/health") == 200
        server.start()
        wait_until(lambda: own.status_of("/ready") == 200)
        wait_until(lambda: own.ask().status_code == 200)


def test_under_load_a_stop_and_a_start_give_no_other_answer_than_200_and_503(
    tmp_path: Path, tokenizer: Tokenizer, server: postgres.PostgresServer
) -> None:
    with world(tmp_path / "data", tokenizer, grace_s=OVER_AT_ONCE_S, url=own_database(server, tmp_path)) as own:
        seen: list[int] = []

        def saw(wanted: int) -> bool:
            seen.append(own.ask().status_code)
            return seen[-1] == wanted

        for change, wanted in ((server.stop, 503), (server.start, 200), (server.stop, 503), (server.start, 200)):
            change()
            wait_until(partial(saw, wanted))
            seen += [own.ask().status_code for _ in range(30)]
        assert set(seen) == {200, 503}
        wait_until(lambda: own.client.get("/v1/usage").status_code == 200 and used(own) == own.used)


def test_sqlite_held_by_another_process_is_503_for_what_must_write(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 0.5)  # ten seconds otherwise
    with world(tmp_path / "data", tokenizer, grace_s=OVER_AT_ONCE_S) as own:
        with held(tmp_path / "data" / "multilora.db"):
            for change in CHANGES.values():
                assert_comes_back(change(own))
            assert own.ask().status_code == own.ask("cold").status_code == 200
            assert own.status_of("/ready") == 200
        assert CHANGES["adapter"](own).status_code == 201
        wait_until(lambda: used(own) == own.used)


CHANGES: dict[str, Callable[[World], httpx.Response]] = {
    "adapter": lambda own: own.upload("new", seed=3),
    "file": lambda own: own.client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": b"{}\n"}),
    "tenant": lambda own: own.admin.post("/admin/tenants", json={"name": "new"}),
    "delete": lambda own: own.client.delete("/v1/adapters/law"),
}


@pytest.mark.parametrize("on_postgres", [False, True])
@pytest.mark.parametrize("leaves_empty_folder", [False, True])
def test_a_data_directory_that_is_deleted_under_the_server_takes_nothing(
    tmp_path: Path, tokenizer: Tokenizer, server: postgres.PostgresServer, on_postgres: bool, leaves_empty_folder: bool
) -> None:
    """It answered 201, and what it had confirmed was gone."""
    data_dir = tmp_path / "data"
    url = own_database(server, tmp_path) if on_postgres else None
    with world(data_dir, tokenizer, grace_s=OVER_AT_ONCE_S, url=url) as own:
        shutil.rmtree(data_dir)
        if leaves_empty_folder:
            data_dir.mkdir()
        for change in CHANGES.values():
            assert_comes_back(change(own), "data_dir_gone")
        assert not data_dir.exists() or list(data_dir.iterdir()) == []
        wait_until(lambda: own.status_of("/ready") == 503)
        assert own.status_of("/health") == 200


def test_the_schema_of_errors_is_the_apis(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with world(tmp_path / "data", tokenizer, grace_s=OVER_AT_ONCE_S) as own:
        shutil.rmtree(tmp_path / "data")
        body: dict[str, Any] = CHANGES["tenant"](own).json()
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["type"] == "server_error"
