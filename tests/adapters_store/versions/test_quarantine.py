"""A missing or damaged blob is found, put away and told; everything else is served, and a whole copy heals it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store.base.description import BaseDescription
from adapters_store.errors import AdapterUnavailable, BlobDamaged, NotFound, StoreError
from adapters_store.store import AdapterStore
from adapters_store.versions.records import AdapterVersion
from support.models.adapter_files import config_bytes

Publish = Callable[..., AdapterVersion]


def empty(folder: Path) -> None:
    shutil.rmtree(folder)


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def without_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def grown(folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("ab") as stream:
        stream.write(b"\0")


def overwritten(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 500)


def offsets_spoilt(folder: Path) -> None:
    """One digit of the header: the first tensor ends a byte early or late."""
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[data.index(b"]", data.index(b"data_offsets")) - 1] ^= 1
    path.write_bytes(bytes(data))


def a_pointer(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def config_spoilt(folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(b"{")


def flipped(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    for packed in folder.glob("packed-*"):
        packed.unlink()


FAULTS: dict[Callable[[Path], None], str] = {
    empty: "blob_missing",
    without_weights: "blob_missing",
    without_config: "blob_missing",
    cut_short: "blob_damaged",
    grown: "blob_damaged",
    overwritten: "blob_damaged",
    config_spoilt: "blob_damaged",
    offsets_spoilt: "blob_damaged",
    a_pointer: "blob_damaged",
}


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_a_blob_that_is_not_whole_is_put_away_and_the_rest_is_served(
    spoil: Callable[[Path], None], store: AdapterStore, publish: Publish, base: BaseDescription
) -> None:
    good, bad = publish("good", seed=1), publish("bad", seed=2)
    spoil(store.weights_of(bad.digest).parent)
    found = store.check_integrity()
    assert (found.num_blobs, found.quarantined, found.restored) == (2, [bad.digest], [])
    with pytest.raises(AdapterUnavailable) as caught:
        store.resolve("acme", "bad")
    assert caught.value.code == "adapter_quarantined"
    assert FAULTS[spoil] in caught.value.message
    assert store.resolve("acme", "good").digest == good.digest
    assert store.load_packed(good.digest, base).digest == good.digest
    assert {version.name: version.quarantined for version in store.list_versions()} == {
        "good": None,
        "bad": FAULTS[spoil],
    }
    assert store.check_integrity().quarantined == []
    newest = store.audit.entries(limit=1)[0]
    assert (newest.action, newest.target, newest.detail) == (
        "adapter.quarantine",
        bad.digest,
        {"code": FAULTS[spoil]},
    )


def test_damage_inside_the_tensors_is_found_by_the_first_load(
    store: AdapterStore, publish: Publish, base: BaseDescription
) -> None:
    bad = publish("bad")
    flipped(store.weights_of(bad.digest).parent)
    assert store.check_integrity().quarantined == []
    with pytest.raises(BlobDamaged):
        store.load_packed(bad.digest, base)
    with pytest.raises(AdapterUnavailable, match="blob_damaged"):
        store.resolve("acme", "bad")


@pytest.mark.parametrize("spoil", [offsets_spoilt, a_pointer])
def test_a_header_that_no_upload_has_is_damage_to_the_first_load(
    spoil: Callable[[Path], None], store: AdapterStore, publish: Publish, base: BaseDescription
) -> None:
    bad = publish("bad")
    spoil(store.weights_of(bad.digest).parent)
    with pytest.raises(BlobDamaged):
        store.verify(bad.digest, base)
    assert [entry.code for entry in store.quarantine.entries()] == ["blob_damaged"]


def test_what_another_version_of_the_program_took_is_not_damage(
    store: AdapterStore, publish: Publish, base: BaseDescription
) -> None:
    later = publish("later")
    config = store.weights_of(later.digest).parent / "adapter_config.json"
    config.write_bytes(config_bytes(a_field_of_tomorrow={"depth": 2}))
    assert store.check_integrity().quarantined == []
    with pytest.raises(AdapterUnavailable, match="a_field_of_tomorrow") as refused:
        store.verify(later.digest, base)
    assert refused.value.code == "unknown_field"
    assert store.quarantine.entries() == []


@pytest.mark.parametrize("spoil", [empty, flipped])
def test_pushing_the_same_content_again_heals(
    spoil: Callable[[Path], None], store: AdapterStore, publish: Publish, base: BaseDescription
) -> None:
    bad = publish("bad")
    spoil(store.weights_of(bad.digest).parent)
    with pytest.raises(BlobDamaged):
        store.load_packed(bad.digest, base)
    again = publish("bad")
    assert (again.digest, again.version) == (bad.digest, 1)
    assert store.resolve("acme", "bad").quarantined is None
    assert store.load_packed(bad.digest, base).digest == bad.digest
    assert "adapter.release" in [entry.action for entry in store.audit.entries()]


def test_a_blob_put_back_from_a_backup_is_served_again(store: AdapterStore, publish: Publish, tmp_path: Path) -> None:
    bad = publish("bad")
    folder = store.weights_of(bad.digest).parent
    shutil.copytree(folder, tmp_path / "backup")
    empty(folder)
    assert store.check_integrity().quarantined == [bad.digest]
    shutil.copytree(tmp_path / "backup", folder)
    assert store.check_integrity().restored == [bad.digest]
    assert store.resolve("acme", "bad").digest == bad.digest


def test_damage_that_no_header_shows_is_not_called_restored_by_a_check(
    store: AdapterStore, publish: Publish, base: BaseDescription
) -> None:
    """Each start released it, and the next request found the damage again."""
    store.remember_base(base)
    bad = publish("bad")
    path = store.weights_of(bad.digest)
    whole = path.read_bytes()
    flipped(path.parent)
    with pytest.raises(BlobDamaged):
        store.load_packed(bad.digest, base)
    assert store.check_integrity().restored == []
    with pytest.raises(AdapterUnavailable, match="blob_damaged"):
        store.resolve("acme", "bad")
    path.write_bytes(whole)
    assert store.check_integrity().restored == [bad.digest]
    assert store.load_packed(bad.digest, base).digest == bad.digest


def test_what_was_put_away_for_another_reason_stays_until_it_is_released(store: AdapterStore, publish: Publish) -> None:
    bad = publish("bad")
    assert store.quarantine.put(bad.digest, "adapter_numerics", "NaN in 3 requests")
    assert not store.quarantine.put(bad.digest, "blob_damaged", "later")
    assert store.check_integrity().restored == []
    publish("bad")
    with pytest.raises(AdapterUnavailable, match="adapter_numerics"):
        store.resolve("acme", "bad")
    [entry] = store.quarantine.entries()
    assert (entry.digest, entry.code, entry.message) == (bad.digest, "adapter_numerics", "NaN in 3 requests")
    store.quarantine.release(bad.digest)
    assert store.resolve("acme", "bad").digest == bad.digest
    with pytest.raises(NotFound) as caught:
        store.quarantine.release(bad.digest)
    assert caught.value.code == "not_quarantined"


def test_one_tenants_quarantine_is_every_tenants_for_the_same_content(store: AdapterStore, publish: Publish) -> None:
    store.tenants.create("globex")
    publish("law")
    theirs = publish("law", tenant="globex")
    empty(store.weights_of(theirs.digest).parent)
    store.check_integrity()
    for tenant in ("acme", "globex"):
        with pytest.raises(AdapterUnavailable):
            store.resolve(tenant, "law")


def test_what_one_tenants_requests_have_shown_counts_for_this_tenant_alone(
    store: AdapterStore, publish: Publish
) -> None:
    store.tenants.create("globex")
    digest = publish("law").digest
    assert publish("law", tenant="globex").digest == digest
    assert store.quarantine.put(digest, "adapter_numerics", "NaN", tenant="globex")
    assert not store.quarantine.put(digest, "adapter_numerics", "NaN", tenant="globex")
    assert not store.quarantine.put(digest, "adapter_numerics", "NaN", tenant="nobody")
    assert store.resolve("acme", "law").digest == digest
    with pytest.raises(AdapterUnavailable, match="adapter_numerics"):
        store.resolve("globex", "law")
    assert [entry.tenant for entry in store.quarantine.entries()] == ["globex"]
    assert [row.tenant for row in store.audit.entries() if row.action == "adapter.quarantine"] == ["globex"]
    assert store.quarantine.put(digest, "blob_damaged", "for all")
    assert [version.quarantined for version in store.versions("globex", "law")] == ["blob_damaged"]
    with pytest.raises(NotFound):
        store.quarantine.release(digest, tenant="acme")
    store.quarantine.release(digest, tenant="globex")
    assert [entry.tenant for entry in store.quarantine.entries()] == [None]
    store.quarantine.put(digest, "adapter_numerics", "NaN", tenant="globex")
    store.quarantine.release(digest)
    assert store.quarantine.entries() == []


def test_a_deleted_tenants_quarantine_goes_with_it(store: AdapterStore, publish: Publish) -> None:
    store.tenants.create("globex")
    digest = publish("law", tenant="globex").digest
    store.quarantine.put(digest, "adapter_numerics", "NaN", tenant="globex")
    store.tenants.delete("globex")
    assert store.quarantine.entries() == []
    store.tenants.create("globex")
    publish("law", tenant="globex")
    assert store.resolve("globex", "law").digest == digest


def test_an_older_version_can_be_activated_instead(store: AdapterStore, publish: Publish) -> None:
    publish("law", seed=1)
    second = publish("law", seed=2)
    empty(store.weights_of(second.digest).parent)
    store.check_integrity()
    store.aliases.activate("acme", "law", 1)
    assert store.resolve("acme", "law").version == 1


def test_a_quarantined_canary_is_answered_by_the_active_version(store: AdapterStore, publish: Publish) -> None:
    publish("law", seed=1)
    second = publish("law", seed=2, activate=False)
    store.aliases.set_canary("acme", "law", 2, 50)
    assert {store.resolve("acme", "law", str(user)).version for user in range(50)} == {1, 2}
    store.quarantine.put(second.digest, "blob_damaged", "x")
    assert {store.resolve("acme", "law", str(user)).version for user in range(50)} == {1}


def test_damage_is_still_told_where_it_cannot_be_written_down(
    store: AdapterStore, publish: Publish, base: BaseDescription, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise StoreError("disk_full", "full")

    bad = publish("bad")
    empty(store.weights_of(bad.digest).parent)
    monkeypatch.setattr(store.quarantine, "put", refuse)
    with pytest.raises(BlobDamaged):
        store.load_packed(bad.digest, base)
