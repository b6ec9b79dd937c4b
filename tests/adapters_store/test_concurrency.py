"""Several processes and threads on one data directory."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path

from adapters_store.base.description import AdapterDigest
from adapters_store.store import AdapterStore
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base, write
from support.servers.keys import owner_of

BASE = tiny_base()
fork = multiprocessing.get_context("fork")


def upload(folder: Path, seed: int) -> Path:
    return write(folder / f"{seed}.safetensors", safetensors_bytes(lora_tensors(BASE, seed=seed)))


def publish(store: AdapterStore, tenant: str, name: str, weights: Path) -> AdapterDigest:
    return store.publish(tenant=tenant, name=name, config=config_bytes(), weights=weights, base=BASE).digest


def run_all(*actions: Callable[[], None]) -> None:
    """Run each in a process of its own, at the same time; all must succeed."""
    processes = [fork.Process(target=action) for action in actions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def test_two_processes_may_make_the_store_at_once(data_dir: Path) -> None:
    def open_and_create(name: str) -> Callable[[], None]:
        return lambda: (AdapterStore.open(data_dir).tenants.create(name), None)[1]

    run_all(*(open_and_create(f"t{index}") for index in range(4)))
    store = AdapterStore.open(data_dir)
    assert [tenant.name for tenant in store.tenants.list_tenants()] == ["t0", "t1", "t2", "t3"]
    store.close()


def test_two_processes_publish_under_one_name(data_dir: Path, tmp_path: Path) -> None:
    store = AdapterStore.open(data_dir)
    store.tenants.create("acme")
    store.close()

    def publish_many(seeds: range) -> Callable[[], None]:
        def action() -> None:
            own = AdapterStore.open(data_dir)
            for seed in seeds:
                publish(own, "acme", "law", upload(tmp_path, seed))
            own.close()

        return action

    run_all(publish_many(range(0, 10)), publish_many(range(10, 20)))
    store = AdapterStore.open(data_dir)
    versions = store.versions("acme", "law")
    assert [version.version for version in versions] == list(range(1, 21))
    assert len({version.digest for version in versions}) == 20
    assert sum(version.active for version in versions) == 1
    for version in versions:
        assert store.load_packed(version.digest, BASE).digest == version.digest
    store.close()


def test_publishing_and_deleting_the_same_content_never_loses_the_others_blob(data_dir: Path, tmp_path: Path) -> None:
    store = AdapterStore.open(data_dir)
    weights = upload(tmp_path, 0)
    tenants = ("a", "b", "c")
    for tenant in tenants:
        store.tenants.create(tenant)
    store.close()

    def come_and_go(tenant: str) -> Callable[[], None]:
        def action() -> None:
            own = AdapterStore.open(data_dir)
            for _ in range(25):
                digest = publish(own, tenant, "x", weights)
                if tenant == "c":
                    own.sweep(grace_s=60)
                assert own.load_packed(digest, BASE).digest == digest
                own.delete(tenant, "x")
            own.close()

        return action

    run_all(*(come_and_go(tenant) for tenant in tenants))
    assert list((data_dir / "blobs").glob("??/*")) == []


def test_many_threads_use_one_store(data_dir: Path, tmp_path: Path) -> None:
    store = AdapterStore.open(data_dir)
    keys = {f"t{index}": store.tenants.create(f"t{index}").api_key for index in range(6)}
    errors: list[BaseException] = []

    def work(tenant: str, seed: int) -> None:
        try:
            for round_ in range(5):
                weights = upload(tmp_path, 100 * seed + round_)
                digest = publish(store, tenant, "x", weights)
                assert owner_of(store, keys[tenant]) == tenant
                assert store.resolve(tenant, "x").digest == digest
                assert store.load_packed(store.resolve(tenant, f"x@{round_ + 1}").digest, BASE).digest == digest
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(tenant, seed)) for seed, tenant in enumerate(keys)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []
    assert len(store.list_versions()) == 6
    store.close()
