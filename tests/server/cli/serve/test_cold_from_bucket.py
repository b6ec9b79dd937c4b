"""An adapter of 84 MB that is in the object store alone: the time to its first token, and what its load does to others.

MULTILORA_FLEET=long: a server with an empty directory and its object store take a minute of a core. Every figure is
printed beside one of the same run: the plain transfer of the same object, and the inter-token times of a stream while
nothing else runs, while another process downloads the object, while the server loads it, and while it only answers the
same request once more: its own prefill lengthens a step of the others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import obstore
import pytest
from obstore.store import from_url

from adapters_store.base.files import describe_base
from adapters_store.remote.keys import ADAPTERS
from support.models.adapter_files import LAYER_SHAPES, config_bytes, lora_tensors, safetensors_bytes
from support.servers import object_store, postgres
from support.servers.service import make_base
from support.servers.waiting import wait_until

pytestmark = pytest.mark.skipif(os.environ.get("MULTILORA_FLEET") != "long", reason="long form: MULTILORA_FLEET=long")
ADMIN = {"authorization": "Bearer a-key-of-an-operator-0123456789"}
ENDS, RANK = tuple(name.rpartition(".")[2] for name in LAYER_SHAPES), 128
BASE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "max_position_embeddings": 8192}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
POOLS = ("--adapter-pool-mib", "400", "--host-cache-mib", "400", "--kv-cache-mib", "320")
NUM_ALONE, NUM_BESIDE = 4, 6
Server = Any


@dataclass(frozen=True)
class World:
    """One server that has never held any of these adapters; digests: by name."""

    server: Server
    client: httpx.Client
    blob_url: str
    endpoint: str
    digests: dict[str, str]

    def first_token_s(self, model: str) -> float:
        start_s = time.perf_counter()
        for _ in self.stream(model, max_tokens=2):
            return time.perf_counter() - start_s
        raise AssertionError("no token came")

    def stream(self, model: str, max_tokens: int) -> Iterator[str]:
        body = {"model": model, "prompt": "Hi", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        with self.client.stream("POST", "/v1/completions", json=body, headers=ADMIN) as answer:
            assert answer.status_code == 200, answer.read()
            yield from (line for line in answer.iter_lines() if line.startswith("data: {"))

    def transfer_s(self, name: str) -> float:
        """The same bytes, by the same client library, to memory that is dropped."""
        store = from_url(self.blob_url, client_options={"allow_http": True})
        start_s = time.perf_counter()
        num_bytes = sum(len(chunk) for chunk in obstore.get(store, ADAPTERS.keys(self.digests[name])[0]).stream())
        assert num_bytes > 80e6
        return time.perf_counter() - start_s


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, serve_process: Callable[..., Any]) -> Iterator[World]:
    root = tmp_path_factory.mktemp("cold")
    base = make_base(root / "base", **BASE, **HEADS)
    with postgres.running() as url, object_store.running() as objects, pytest.MonkeyPatch.context() as patch:
        blob_url = objects.bucket("cold")
        variables = {**objects.environment, "MULTILORA_DATABASE_URL": url, "MULTILORA_BLOB_URL": blob_url}
        variables |= {"MULTILORA_ADMIN_KEY": ADMIN["authorization"].removeprefix("Bearer "), "OMP_NUM_THREADS": "1"}
        for name, value in variables.items():
            patch.setenv(name, value)
        arguments = ("--base", base, "--json", "--drain-s", "1", *POOLS)
        with serving(serve_process, *arguments, "--data-dir", root / "first") as (_, client):
            assert client.post("/admin/tenants", json={"name": "default"}, headers=ADMIN).status_code == 201
            digests = {f"n{seed}": upload(client, base, seed) for seed in range(NUM_ALONE + NUM_BESIDE)}
        with serving(serve_process, *arguments, "--data-dir", root / "second") as (server, client):
            yield World(server, client, blob_url, objects.endpoint, digests)


@contextmanager
def serving(serve_process: Callable[..., Any], *arguments: str | Path) -> Iterator[tuple[Server, httpx.Client]]:
    with serve_process(*arguments) as server:
        wait_until(server.is_ready, timeout_s=900)
        with httpx.Client(base_url=server.url, timeout=600) as client:
            yield server, client


def upload(client: httpx.Client, base: Path, seed: int) -> str:
    weights = safetensors_bytes(lora_tensors(describe_base(base), ends=ENDS, rank=RANK, seed=seed))
    assert 83e6 < len(weights) < 85e6
    files = {"config": config_bytes(r=RANK, target_modules=list(ENDS)), "weights": weights}
    made = client.post("/v1/adapters", data={"name": f"n{seed}"}, files=files, headers=ADMIN)
    assert made.status_code == 201, made.text
    return str(made.json()["digest"])


def test_the_first_token_of_an_adapter_that_the_object_store_alone_has(world: World) -> None:
    world.first_token_s("base")
    took = []
    for name in list(world.digests)[:NUM_ALONE]:
        transfer_s, cold_s = world.transfer_s(name), world.first_token_s(name)
        warm_s = world.first_token_s(name)
        took.append((cold_s, transfer_s, warm_s))
        print(f"{name}: first token {cold_s:.2f} s, transfer {transfer_s:.2f} s, resident {warm_s:.2f} s")
    beyond_s = [cold_s - transfer_s for cold_s, transfer_s, _ in took]
    print(f"beyond the transfer: {median(beyond_s):.2f} s ({min(beyond_s):.2f} .. {max(beyond_s):.2f})")
    assert all(cold_s > warm_s for cold_s, _, warm_s in took), "an adapter was there before"


def test_others_inter_token_times_while_such_adapters_are_fetched(world: World) -> None:
    names = list(world.digests)[NUM_ALONE:]
    with other_stream(world) as gaps:
        cases = {"quiet": lambda: time.sleep(1.5), "downloaded by a client": lambda: world.transfer_s(names[0])}
        seen: dict[str, list[float]] = {case: [] for case in (*cases, "loaded", "resident")}
        for name in names:
            asked = {case: lambda name=name: world.first_token_s(name) for case in ("loaded", "resident")}
            for case, act in {**cases, **asked}.items():
                before = len(gaps)
                act()
                seen[case] += gaps[before:]
    quiet_s = p95(seen["quiet"])
    for case, times in seen.items():
        print(f"{case}: {len(times)} gaps, p50 {1000 * median(times):.1f} ms, p95 {1000 * p95(times):.1f} ms, "
              f"{p95(times) / quiet_s:.2f} of quiet")  # fmt: skip
    assert all(len(times) > 1 for times in seen.values())


def p95(times: list[float]) -> float:
    return quantiles(times, n=20)[18]


@contextmanager
def other_stream(world: World) -> Iterator[list[float]]:
    """The gaps between tokens of a stream of the base that lasts as long as the block."""
    stop, gaps = threading.Event(), list[float]()

    def read() -> None:
        while not stop.is_set():
            last_s = 0.0
            for _ in world.stream("base", max_tokens=2000):
                now_s = time.perf_counter()
                if last_s:
                    gaps.append(now_s - last_s)
                last_s = now_s
                if stop.is_set():
                    return

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: len(gaps) > 50)
    try:
        yield gaps
    finally:
        stop.set()
        thread.join()
