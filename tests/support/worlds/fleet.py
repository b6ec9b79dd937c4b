"""Several servers on one PostgreSQL and one data directory: each its own store, engine, app and socket."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import httpx

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.background import background
from server.api.settings import ApiSettings
from server.engine.text.tokenizer import Tokenizer
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base
from support.models.tokenizer_zoo import byte_level, wrapped
from support.servers.live_server import serving
from support.worlds.fake_engine import FakeEngine

ADMIN_KEY = "admin-key-for-tests"
IS_LONG = os.environ.get("MULTILORA_FLEET") == "long"


class Replica:
    """One server. `client` has no key of its own: keys change in these tests."""

    def __init__(self, url: str, store: AdapterStore, engine: FakeEngine) -> None:
        self.store = store
        self.engine = engine
        self.client = httpx.Client(base_url=url, timeout=60)
        self.admin = httpx.Client(base_url=url, timeout=60, headers={"authorization": f"Bearer {ADMIN_KEY}"})

    def ask(self, key: str, model: str = "law", max_tokens: int = 2, prompt: str = "Hi") -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        return self.client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})

    def upload(self, key: str, name: str, seed: int) -> httpx.Response:
        weights = safetensors_bytes(lora_tensors(tiny_base(), seed=seed))
        files = {"config": config_bytes(), "weights": weights}
        headers = {"authorization": f"Bearer {key}"}
        return self.client.post("/v1/adapters", data={"name": name}, files=files, headers=headers)

    def close(self) -> None:
        self.client.close()
        self.admin.close()


@contextmanager
def fleet(
    data_dir: Path, url: str, num: int, *, poll_s: float = 0.5, step_s: float = 0.0, follows: bool = True
) -> Iterator[list[Replica]]:
    """poll_s: how often a server looks for changes that were not announced. follows: whether it hears announcements."""
    tokenizer = Tokenizer(wrapped(byte_level()))
    settings = ApiSettings(data_dir=data_dir, admin_keys=(ADMIN_KEY,))
    with ExitStack() as stack:
        replicas: list[Replica] = []
        for _ in range(num):
            store = AdapterStore.open(data_dir, database_url=url, poll_s=poll_s)
            stack.callback(store.close)
            if not follows:
                store.following = nullcontext  # type: ignore[method-assign]
            engine = stack.enter_context(FakeEngine(tiny_base(), tokenizer, step_s=step_s))
            app = create_app(engine=engine, store=store, settings=settings)
            stack.enter_context(background(app))
            replica = Replica(stack.enter_context(serving(app)), store, engine)
            stack.callback(replica.close)
            replicas.append(replica)
        yield replicas
