"""What is changed at one server counts at the others while they are under load.

The short form proves the way: servers that hear announcements look by themselves once an hour. MULTILORA_FLEET=long
measures and prints: p99 of the time from the answer at one server to the first answer at the other that follows it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles

import pytest

from support.servers import postgres
from support.servers.waiting import wait_until
from support.worlds.fleet import IS_LONG, Replica, fleet

NUM_ROUNDS = 40 if IS_LONG else 1
NEVER_S, POLL_S = 3600.0, 0.5
LIMIT_S = 60.0  # of a way that is broken; the figure is in the log


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.PostgresServer]:
    with postgres.server() as server:
        yield server


@contextmanager
def load_at(replica: Replica, key: str, num_clients: int = 2) -> Iterator[list[int]]:
    """Clients that ask without a pause; the statuses that they get."""
    stop, seen = threading.Event(), list[int]()

    def ask() -> None:
        while not stop.is_set():
            seen.append(replica.ask(key, "busy").status_code)

    threads = [threading.Thread(target=ask) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    yield seen
    stop.set()
    for thread in threads:
        thread.join()


def followed_s(change: Callable[[], object], has_followed: Callable[[], bool]) -> float:
    change()
    start_s = time.perf_counter()
    wait_until(has_followed)
    return time.perf_counter() - start_s


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_change_at_one_server_counts_at_the_other(
    tmp_path: Path, server: postgres.PostgresServer, is_announced: bool
) -> None:
    url = server.database(f"replicas-{is_announced}".lower())
    poll_s = POLL_S if IS_LONG or not is_announced else NEVER_S
    with fleet(tmp_path / "data", url, 2, poll_s=poll_s, follows=is_announced) as (a, b):
        busy = a.store.tenants.create("busy").api_key
        assert a.upload(busy, "busy", 9).status_code == 201
        key = a.store.tenants.create("acme").api_key
        for seed in range(2):
            assert a.upload(key, "law", seed).status_code == 201
        with load_at(b, busy) as seen:
            times_s = [each for _ in range(NUM_ROUNDS) for each in changes(a, b)]
        assert set(seen) == {200}
        p99_s = quantiles(times_s, n=100)[98]
        print(f"announced {is_announced}: {len(times_s)} changes, p99 {1000 * p99_s:.0f} ms, {len(seen)} answers")
        if IS_LONG:
            assert p99_s <= LIMIT_S


def changes(a: Replica, b: Replica) -> Iterator[float]:
    """Rotate a key, roll back, unload, each at `a`; the time until `b` answers accordingly."""
    key = a.store.tenants.rotate_key("acme").api_key
    wait_until(lambda: b.ask(key).status_code == 200)
    yield followed_s(lambda: a.admin.post("/admin/tenants/acme/rotate-key"), lambda: b.ask(key).status_code == 401)
    key = a.store.tenants.rotate_key("acme").api_key
    yield followed_s(lambda: a.store.aliases.roll_back("acme", "law"), lambda: version(b, key) == "law@1")
    yield followed_s(lambda: a.store.aliases.activate("acme", "law", 2), lambda: version(b, key) == "law@2")
    yield followed_s(lambda: a.store.aliases.unload("acme", "law", 2), lambda: b.ask(key, "law@2").status_code == 404)
    a.store.aliases.activate("acme", "law", 1)
    a.store.aliases.activate("acme", "law", 2)
    wait_until(lambda: version(b, key) == "law@2")


def version(replica: Replica, key: str) -> str | None:
    return replica.ask(key).headers.get("x-multilora-adapter-version")
