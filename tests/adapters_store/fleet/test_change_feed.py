"""Two stores on one real PostgreSQL: what one changes counts for the other at once, or at its next look."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import pytest
from sqlalchemy.pool import QueuePool

from adapters_store.accounts.records import Quotas
from adapters_store.fleet.change_feed import ChangeFeed
from adapters_store.store import AdapterStore
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base, write
from support.servers import postgres
from support.servers.waiting import wait_until
from support.worlds.fleet import IS_LONG

NEVER_S = 3600.0  # only an announcement can bring the change
LISTENERS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.PostgresServer]:
    with postgres.server() as server:
        yield server


class World:
    """One database and one directory; `open` gives one more store on them."""

    def __init__(self, data_dir: Path, url: str) -> None:
        self._data_dir, self._url = data_dir, url
        self._stack = ExitStack()
        self.one = self.open()
        self._num_tenants = 0

    def open(self, *, poll_s: float = NEVER_S) -> AdapterStore:
        store = AdapterStore.open(self._data_dir, database_url=self._url, poll_s=poll_s)
        self._stack.callback(store.close)
        return store

    def tenant(self) -> str:
        """A new one's key."""
        self._num_tenants += 1
        return self.one.tenants.create(f"t{self._num_tenants}").api_key

    @contextmanager
    def hearing(self, heard: list[str]) -> Iterator[None]:
        """With a feed of `one`; returns when it listens."""
        feed = ChangeFeed(self.one.database.url, self.one.database.sender, lambda: heard.append("change"))
        feed.start()
        wait_until(lambda: len(heard) == 1)  # for what it may have missed before
        yield
        feed.stop()

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, server: postgres.PostgresServer) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("feed") / "data", server.url)
    yield world
    world.close()


def publish(store: AdapterStore, folder: Path, seed: int) -> None:
    weights = write(folder / f"{seed}.safetensors", safetensors_bytes(lora_tensors(tiny_base(), seed=seed)))
    store.publish(tenant="acme", name="law", config=config_bytes(), weights=weights, base=tiny_base())


def test_what_one_store_changes_counts_for_the_other_as_soon_as_it_is_announced(world: World, tmp_path: Path) -> None:
    one, other = world.one, world.open()
    key = one.tenants.create("acme").api_key
    for seed in range(2):
        publish(one, tmp_path, seed)
    with other.following():
        for number in range(3):
            wait_until(partial(is_open, other, key))
            wait_until(lambda: other.resolve("acme", "law").version == 2)
            assert other.quotas.get("acme").max_concurrent == (number or None)
            before, key = key, one.tenants.rotate_key("acme").api_key
            wait_until(partial(is_closed, other, before))
            one.aliases.roll_back("acme", "law")
            wait_until(lambda: other.resolve("acme", "law").version == 1)
            one.aliases.activate("acme", "law", 2)
            one.quotas.set("acme", Quotas(max_concurrent=number + 1))
            wait_until(lambda n=number: other.quotas.get("acme").max_concurrent == n + 1)  # type: ignore[misc]


def is_open(store: AdapterStore, key: str) -> bool:
    return store.tenants.authenticate(key) is not None


def is_closed(store: AdapterStore, key: str) -> bool:
    return store.tenants.authenticate(key) is None


def test_a_cut_connection_is_made_again_and_what_it_missed_counts(
    world: World, server: postgres.PostgresServer
) -> None:
    other = world.open()
    key = world.tenant()
    with other.following():
        for _ in range(2):
            wait_until(partial(is_open, other, key))
            server.execute(LISTENERS)
            before, key = key, world.one.tenants.rotate_key(f"t{world._num_tenants}").api_key  # no connection hears it
            wait_until(partial(is_closed, other, before))


def test_without_announcements_the_other_store_looks_by_itself(world: World) -> None:
    """A pooler of connections lets LISTEN pass and delivers nothing."""
    other = world.open(poll_s=0.05)
    key = world.tenant()
    assert other.tenants.authenticate(key) is not None
    world.one.tenants.set_disabled(f"t{world._num_tenants}", True)
    wait_until(partial(is_closed, other, key))


def test_a_process_does_not_hear_itself_nor_what_failed(world: World) -> None:
    heard: list[str] = []
    one, other = world.one, world.open()
    with world.hearing(heard):
        world.tenant()
        with pytest.raises(RuntimeError):
            fail_after_the_announcement(other)
        for number in (2, 3):
            other.tenants.create(f"heard{number}")
            wait_until(lambda n=number: len(heard) == n)  # type: ignore[misc]
            one.tenants.create(f"own{number}")
    assert len(heard) == 3


def test_each_change_is_heard_once(world: World) -> None:
    """And how soon after its commit has returned, printed."""
    heard_s: list[float] = []
    feed = ChangeFeed(world.one.database.url, world.one.database.sender, lambda: heard_s.append(time.perf_counter()))
    feed.start()
    wait_until(lambda: len(heard_s) == 1)
    other, took_ms = world.open(), list[float]()
    for number in range(2, 402 if IS_LONG else 12):
        other.remember_base(tiny_base())
        done_s = time.perf_counter()
        wait_until(lambda n=number: len(heard_s) == n)  # type: ignore[misc]
        took_ms.append(max(0.0, 1000 * (heard_s[-1] - done_s)))
    feed.stop()
    print(f"heard: p50 {median(took_ms):.1f} ms, p99 {quantiles(took_ms, n=100)[98]:.1f} ms after the commit")
    assert len(heard_s) == len(took_ms) + 1


def fail_after_the_announcement(store: AdapterStore) -> None:
    with store.database.write() as connection:
        store.database._count_change(connection)
        raise RuntimeError("no commit")


def test_waiting_writers_hold_no_connection(world: World) -> None:
    """A server whose uploads all wait for another process's change still answers readers."""
    one, other = world.one, world.open()
    calls = [partial(one.tenants.create, f"waiting{number}") for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        with other.database.write():
            futures = [pool.submit(call) for call in calls]
            wait_until(one.database._turn.locked)
            assert one.tenants.get("acme").name == "acme"
            assert isinstance(one.database.engine.pool, QueuePool)
            assert one.database.engine.pool.checkedout() <= 1
        assert [future.result().tenant for future in futures] == [f"waiting{number}" for number in range(12)]
