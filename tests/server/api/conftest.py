"""The API over a real store and an engine, through a real socket.

The engine is `support.worlds.fake_engine`; MULTILORA_TEST_ENGINE=real runs the same tests over the real one and a tiny
random model, less those that need an engine to fail or wait on demand. A server serves one test module: tests use
names of their own, and override `settings` for limits of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.engine_client import EngineClient
from server.api.settings import ApiSettings
from server.engine.startup.build import build_engine
from server.engine.startup.settings import EngineSettings, MemoryBudget
from server.engine.text.tokenizer import Tokenizer
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base
from support.models.tokenizer_zoo import byte_level, wrapped
from support.servers.live_server import serving
from support.servers.service import make_base
from support.worlds.fake_engine import FakeEngine

ADMIN_KEY = "admin-key-for-tests"
USE_REAL_ENGINE = os.environ.get("MULTILORA_TEST_ENGINE") == "real"

MakeClient = Callable[..., httpx.Client]
Upload = Callable[..., httpx.Response]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(wrapped(byte_level()))


@pytest.fixture(scope="module")
def fake_engine(tokenizer: Tokenizer) -> Iterator[FakeEngine]:
    if USE_REAL_ENGINE:
        pytest.skip("this test tells its engine what to do")
    with FakeEngine(tiny_base(), tokenizer) as engine:
        yield engine


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the real engine's base."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def real_engine(store: AdapterStore, base_folder: Path) -> Iterator[EngineClient]:
    settings = EngineSettings(
        base=base_folder,
        dtype="float32",
        num_threads=1,
        max_model_len=512,
        memory=MemoryBudget(kv_cache=16 << 20, adapter_pool=4 << 20, host_cache=64 << 20),
    )
    parts = build_engine(settings, store)
    parts.worker.start()
    yield parts.worker
    parts.close()


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> EngineClient:
    engine: EngineClient = request.getfixturevalue("real_engine" if USE_REAL_ENGINE else "fake_engine")
    return engine


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def store(data_dir: Path) -> Iterator[AdapterStore]:
    store = AdapterStore.open(data_dir)
    yield store
    store.close()


@pytest.fixture(scope="module")
def keys(store: AdapterStore) -> dict[str, str]:
    """API keys by tenant."""
    return {name: store.tenants.create(name).api_key for name in ("acme", "globex")}


@pytest.fixture(scope="module")
def settings(data_dir: Path) -> ApiSettings:
    return ApiSettings(data_dir=data_dir, admin_keys=(ADMIN_KEY,), metrics_max_age_s=0)


@pytest.fixture(scope="module")
def app(engine: EngineClient, store: AdapterStore, settings: ApiSettings) -> FastAPI:
    return create_app(engine=engine, store=store, settings=settings)


@pytest.fixture(scope="module")
def url(app: FastAPI) -> Iterator[str]:
    with serving(app) as url:
        yield url


@pytest.fixture(scope="module")
def connect(url: str) -> Iterator[MakeClient]:
    """connect(key, **headers): a client of the server; no key where it is None."""
    clients: list[httpx.Client] = []

    def make(key: str | None, **headers: str) -> httpx.Client:
        own = {} if key is None else {"Authorization": f"Bearer {key}"}
        clients.append(httpx.Client(base_url=url, headers={**own, **headers}, timeout=300))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def ai(url: str, keys: dict[str, str]) -> Iterator[openai.OpenAI]:
    """OpenAI's own client with acme's key."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=keys["acme"], max_retries=0) as ai:
        yield ai


@pytest.fixture(scope="module")
def client(connect: MakeClient, keys: dict[str, str]) -> httpx.Client:
    """Tenant acme's."""
    return connect(keys["acme"])


@pytest.fixture(scope="module")
def other(connect: MakeClient, keys: dict[str, str]) -> httpx.Client:
    """Tenant globex's."""
    return connect(keys["globex"])


@pytest.fixture(scope="module")
def admin(connect: MakeClient) -> httpx.Client:
    return connect(ADMIN_KEY)


@pytest.fixture(scope="module")
def upload(engine: EngineClient) -> Upload:
    """upload(client, name, seed=..., activate=..., fields=..., **config changes): a small adapter whose tensors follow
    seed; fields: further parts of the form."""

    def post(
        client: httpx.Client,
        name: str = "law",
        *,
        seed: int = 0,
        activate: bool = True,
        fields: Mapping[str, str] = MappingProxyType({}),
        **changes: Any,
    ) -> httpx.Response:
        weights = safetensors_bytes(lora_tensors(engine.base, seed=seed))
        files = {"config": config_bytes(**changes), "weights": weights}
        return client.post("/v1/adapters", params={"activate": activate}, data={"name": name, **fields}, files=files)

    return post
