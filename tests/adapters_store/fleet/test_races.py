"""Two stores on one real PostgreSQL change the same thing at the same moment: one after the other, as on SQLite."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import insert

from adapters_store.accounts.records import Quotas
from adapters_store.base.description import AdapterDigest
from adapters_store.errors import Conflict
from adapters_store.fleet.serving_base import LIFE_S, serving_base
from adapters_store.storage.schema import servers
from adapters_store.store import AdapterStore
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base, write
from support.servers import postgres
from support.servers.racing import race

NUM_ROUNDS = 40 if os.environ.get("MULTILORA_FLEET") == "long" else 4
BASE = tiny_base()
Act = Callable[[AdapterStore], object]


class Pair:
    """Two stores on one database and one directory; tenant acme."""

    def __init__(self, data_dir: Path, url: str) -> None:
        self.stores = [AdapterStore.open(data_dir, database_url=url) for _ in range(2)]
        self.one = self.stores[0]
        self.key = self.one.tenants.create("acme").api_key
        self._folder = data_dir.parent

    def weights(self, seed: int) -> Path:
        path = self._folder / f"{seed}.safetensors"
        return path if path.exists() else write(path, safetensors_bytes(lora_tensors(BASE, seed=seed)))

    def publish(self, name: str, seed: int, store: AdapterStore | None = None, tenant: str = "acme") -> AdapterDigest:
        own = store or self.one
        weights = self.weights(seed)
        return own.publish(tenant=tenant, name=name, config=config_bytes(), weights=weights, base=BASE).digest

    def at_once(self, *acts: Act) -> list[str]:
        """Each at a store of its own; the codes of what they raised, in order."""
        outcomes = race([partial(act, store) for act, store in zip(acts, self.stores, strict=True)])
        return sorted("ok" if each is None else getattr(each, "code", repr(each)) for each in outcomes)

    def both(self, act: Act) -> list[str]:
        return self.at_once(act, act)

    def percents(self, name: str) -> list[int]:
        return [version.percent for version in self.one.versions("acme", name)]

    def active(self, name: str) -> int:
        return next(version.version for version in self.one.versions("acme", name) if version.active)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with postgres.running() as url:
        pair = Pair(tmp_path_factory.mktemp("races") / "data", url)
        for seed in range(3):
            pair.publish("style", seed)
        yield pair
        for store in pair.stores:
            store.close()


@pytest.fixture(params=range(NUM_ROUNDS))
def number(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def reset(pair: Pair) -> None:
    """Version 3 is active, 2 and 1 were before it; no canaries."""
    for version in (1, 2, 3):
        pair.one.aliases.activate("acme", "style", version)


def test_a_tenant_is_created_once(pair: Pair, number: int) -> None:
    assert pair.both(lambda store: store.tenants.create(f"t{number}")) == ["ok", "tenant_exists"]


def test_two_canaries_that_do_not_fit_together_are_not_both_accepted(pair: Pair, number: int) -> None:
    reset(pair)
    codes = pair.at_once(*(partial(canary, version=version, percent=60) for version in (1, 2)))
    assert codes == ["canary_too_large", "ok"]
    assert sorted(pair.percents("style")) == [0, 40, 60]


def canary(store: AdapterStore, *, version: int, percent: int) -> None:
    store.aliases.set_canary("acme", "style", version, percent)


def test_the_same_canary_twice_is_one_canary(pair: Pair, number: int) -> None:
    reset(pair)
    assert pair.both(partial(canary, version=1, percent=30)) == ["ok", "ok"]
    assert pair.percents("style") == [30, 0, 70]


def test_a_canary_is_promoted_once(pair: Pair, number: int) -> None:
    reset(pair)
    pair.one.aliases.set_canary("acme", "style", 1, 30)
    assert pair.both(lambda store: store.aliases.promote("acme", "style")) == ["no_canary", "ok"]
    assert pair.percents("style") == [100, 0, 0]


def test_two_rollbacks_go_back_two_versions(pair: Pair, number: int) -> None:
    reset(pair)
    assert pair.both(lambda store: store.aliases.roll_back("acme", "style")) == ["ok", "ok"]
    assert pair.active("style") == 1


def test_the_same_fault_seen_by_both_is_one_entry(pair: Pair, number: int) -> None:
    digest = AdapterDigest(f"sha256:{number:064x}")
    assert pair.both(lambda store: store.quarantine.put(digest, "blob_damaged", "x")) == ["ok", "ok"]
    assert pair.both(lambda store: store.quarantine.put(digest, "numerics", "x", tenant="acme")) == ["ok", "ok"]
    assert [entry.digest for entry in pair.one.quarantine.entries()].count(digest) == 2


def test_two_servers_that_start_remember_the_base_once(pair: Pair, number: int) -> None:
    assert pair.both(lambda store: store.remember_base(BASE)) == ["ok", "ok"]
    assert [base.digest for base in pair.one.bases()] == [BASE.digest]


def test_the_same_content_is_one_version(pair: Pair, number: int) -> None:
    name = f"same{number}"
    assert pair.both(lambda store: pair.publish(name, 0, store)) == ["ok", "ok"]
    assert [version.version for version in pair.one.versions("acme", name)] == [1]


def test_other_content_is_two_versions_of_which_one_is_active(pair: Pair, number: int) -> None:
    name = f"other{number}"
    codes = pair.at_once(*(lambda store, seed=seed: pair.publish(name, seed, store) for seed in (1, 2)))
    assert codes == ["ok", "ok"]
    assert [version.version for version in pair.one.versions("acme", name)] == [1, 2]
    assert sorted(pair.percents(name)) == [0, 100]


def test_content_deleted_by_one_and_published_by_the_other_is_there(pair: Pair, number: int) -> None:
    pair.publish("gone", 7)
    codes = pair.at_once(lambda store: store.delete("acme", "gone"), lambda store: pair.publish("kept", 7, store))
    assert codes == ["ok", "ok"]
    version = pair.one.resolve("acme", "kept")
    assert pair.one.load_packed(version.digest, BASE).digest == version.digest
    pair.one.delete("acme", "kept")


def test_the_last_room_of_a_quota_is_given_once(pair: Pair, number: int) -> None:
    pair.one.tenants.create(f"full{number}")
    pair.one.quotas.set(f"full{number}", Quotas(max_adapters=1))
    codes = pair.at_once(
        *(lambda store, seed=seed: pair.publish(f"n{seed}", seed, store, f"full{number}") for seed in (1, 2))
    )
    assert codes == ["ok", "quota_adapters"]


def test_a_tenant_deleted_while_its_key_is_rotated_is_gone(pair: Pair, number: int) -> None:
    name = f"leaving{number}"
    pair.one.tenants.create(name)
    codes = pair.at_once(lambda store: store.tenants.delete(name), lambda store: store.tenants.rotate_key(name))
    assert codes in (["ok", "ok"], ["ok", "tenant_not_found"])
    assert name not in [tenant.name for tenant in pair.one.tenants.list_tenants()]


def serve(store: AdapterStore, base: str, until: threading.Event | None = None) -> None:
    """until: served until then, and set by a server that is refused."""
    try:
        with serving_base(store.database, base, f"name of {base}", patience_s=0.1):
            if until is not None:
                assert until.wait(600)
    except Conflict:
        if until is not None:
            until.set()
        raise


def test_two_bases_that_start_together_are_not_both_served(pair: Pair) -> None:
    acts = (partial(serve, base=base, until=refused) for refused in [threading.Event()] for base in ("one", "two"))
    assert pair.at_once(*acts) == ["ok", "other_base_served"]
    assert pair.both(partial(serve, base="two")) == ["ok", "ok"]
    with pair.one.serving("one", "one"), pytest.raises(Conflict, match=r"serves one on this database.* serve name of"):
        serve(pair.stores[1], "two")
    serve(pair.stores[1], "two")


def test_a_killed_servers_base_blocks_no_other_for_longer_than_it_counts(pair: Pair) -> None:
    with pair.one.database.write(changes_answers=False) as connection:
        long_ago = {"id": "killed", "base_digest": "one", "base_name": "one", "seen_s": time.time() - LIFE_S - 5}
        connection.execute(insert(servers).values(long_ago))
    serve(pair.one, "two")


def test_no_writer_was_starved(pair: Pair) -> None:
    """Sanity of the world itself: the stores still answer after all of it."""
    start = pair.one.database.generation()
    pair.stores[1].tenants.create(f"last-{time.monotonic_ns()}")
    assert pair.one.database.generation() == start + 1
