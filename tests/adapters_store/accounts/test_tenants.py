"""Keys open their own tenant and nothing else, and stop when they are told to."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from adapters_store.accounts import tenants
from adapters_store.errors import Conflict, NotFound
from adapters_store.store import AdapterStore
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base, write
from support.servers.keys import owner_of
from support.stopwatch import quiet_s


def test_a_key_opens_its_own_tenant_only(store: AdapterStore) -> None:
    keys = {name: store.tenants.create(name).api_key for name in ("law", "med", "code")}
    assert {name: owner_of(store, key) for name, key in keys.items()} == {n: n for n in keys}


@pytest.mark.parametrize("key", ["", "ml-", "ml-x", "x" * 46, "ml-" + "a" * 100_000, "ml-\ud800", "ml-\x00"])
def test_what_is_no_key_opens_nothing(key: str, store: AdapterStore) -> None:
    assert owner_of(store, key) is None


def test_one_changed_character_opens_nothing(store: AdapterStore) -> None:
    key = store.tenants.create("law").api_key
    for index in range(len(key)):
        other = "A" if key[index] != "A" else "B"
        assert owner_of(store, key[:index] + other + key[index + 1 :]) is None
    assert owner_of(store, key + "x") is None
    assert owner_of(store, key[:-1]) is None


def test_keys_are_random_long_and_kept_only_as_a_hash(store: AdapterStore, data_dir: Path) -> None:
    keys = [store.tenants.create(f"t{index}").api_key for index in range(20)]
    assert len(set(keys)) == 20
    assert all(re.fullmatch(r"ml-[A-Za-z0-9_-]{43}", key) for key in keys)
    store.close()
    on_disk = b"".join(path.read_bytes() for path in data_dir.rglob("*") if path.is_file())
    assert b"t19" in on_disk
    assert not any(key.encode() in on_disk or key[3:].encode() in on_disk for key in keys)


def test_a_key_is_not_shown_by_printing_it(store: AdapterStore) -> None:
    created = store.tenants.create("law")
    assert created.api_key not in repr(created)


def test_a_tenant_is_created_once(store: AdapterStore) -> None:
    key = store.tenants.create("law").api_key
    with pytest.raises(Conflict) as caught:
        store.tenants.create("law")
    assert caught.value.code == "tenant_exists"
    assert owner_of(store, key) == "law"
    assert [tenant.name for tenant in store.tenants.list_tenants()] == ["acme", "law"]


def test_a_rotated_key_replaces_the_old_one_at_once(store: AdapterStore) -> None:
    old = store.tenants.create("law").api_key
    assert owner_of(store, old) == "law"
    new = store.tenants.rotate_key("law").api_key
    assert owner_of(store, new) == "law"
    assert owner_of(store, old) is None


def test_an_overlap_keeps_the_old_key_until_its_end(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old = store.tenants.create("law").api_key
    new = store.tenants.rotate_key("law", overlap_s=60).api_key
    assert [owner_of(store, key) for key in (old, new)] == ["law", "law"]
    later = time.time() + 61
    monkeypatch.setattr(tenants.time, "time", lambda: later)
    assert [owner_of(store, key) for key in (old, new)] == [None, "law"]


def test_rotating_again_never_prolongs_an_old_key(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old = store.tenants.create("law").api_key
    store.tenants.rotate_key("law", overlap_s=60)
    store.tenants.rotate_key("law", overlap_s=6000)
    later = time.time() + 61
    monkeypatch.setattr(tenants.time, "time", lambda: later)
    assert owner_of(store, old) is None


def test_a_key_revoked_by_another_process_stops_within_a_second(store: AdapterStore, data_dir: Path) -> None:
    server = AdapterStore.open(data_dir)
    old = store.tenants.create("law").api_key
    assert owner_of(server, old) == "law"
    store.tenants.rotate_key("law")
    deadline_s = time.monotonic() + 1
    asked_s = 0.0
    while owner_of(server, old) is not None:
        assert asked_s < deadline_s, "asked after a second, a revoked key still opened"
        time.sleep(0.01)
        asked_s = time.monotonic()
    server.close()


def test_a_disabled_tenants_key_opens_nothing_for_now(store: AdapterStore) -> None:
    key = store.tenants.create("law").api_key
    store.tenants.set_disabled("law", True)
    assert owner_of(store, key) is None
    assert store.tenants.get("law").disabled
    store.tenants.set_disabled("law", False)
    assert owner_of(store, key) == "law"


def test_deleting_a_tenant_takes_its_keys_and_adapters(store: AdapterStore, tmp_path: Path, data_dir: Path) -> None:
    base = tiny_base()
    key = store.tenants.create("law").api_key
    weights = write(tmp_path / "w", safetensors_bytes(lora_tensors(base)))
    version = store.publish(tenant="law", name="a", config=config_bytes(), weights=weights, base=base)
    assert store.tenants.delete("law") == [version.digest]
    assert owner_of(store, key) is None
    assert not list((data_dir / "blobs").glob("??/*"))
    with pytest.raises(NotFound):
        store.resolve("law", "a")
    for missing in (store.tenants.get, store.tenants.delete, store.tenants.rotate_key):
        with pytest.raises(NotFound) as caught:
            missing("law")
        assert caught.value.code == "tenant_not_found"
    store.tenants.create("law")
    assert store.versions("law", "a") == []


def test_authenticating_is_cheap_enough_for_every_request(store: AdapterStore) -> None:
    key = store.tenants.create("law").api_key
    owner_of(store, key)
    assert quiet_s(lambda: [owner_of(store, key) for _ in range(2000)]) / 2000 < 100e-6
