"""Versions, names, owners, digests: what publish, resolve, list, activate and delete promise."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters_store.accounts.records import Quotas
from adapters_store.base.description import BaseDescription
from adapters_store.errors import AdapterRejected, AdapterUnavailable, BlobDamaged, Conflict, NotFound, StoreError
from adapters_store.format.limits import AdapterLimits
from adapters_store.store import AdapterStore
from adapters_store.versions.records import AdapterVersion
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base, write
from support.stopwatch import quiet_s

Publish = Callable[..., AdapterVersion]


def blobs_in(data_dir: Path) -> set[str]:
    return {f"sha256:{path.name}" for path in (data_dir / "blobs").glob("??/*")}


def drop_packed_forms(folder: Path) -> None:
    for path in folder.glob("packed-*"):
        path.unlink()


def eventually(condition: Callable[[], bool], seconds: float = 1.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_published_adapter_is_resolved_and_loaded(
    store: AdapterStore, publish: Publish, base: BaseDescription
) -> None:
    version = publish("law", r=4, lora_alpha=8)
    assert store.resolve("acme", "law") == store.resolve("acme", "law@1") == version
    assert (version.tenant, version.name, version.version, version.ref) == ("acme", "law", 1, "law@1")
    assert (version.rank, version.target_modules, version.active) == (4, ("q_proj", "v_proj"), True)
    assert version.base_digest == base.digest
    assert abs(version.created_at - time.time()) < 60
    packed = store.load_packed(version.digest, base)
    assert (packed.digest, packed.num_bytes) == (version.digest, version.num_bytes)


def test_new_content_under_a_name_is_the_next_version(store: AdapterStore, publish: Publish) -> None:
    first, second = publish(seed=1), publish(seed=2)
    assert (first.version, second.version) == (1, 2)
    assert first.digest != second.digest
    assert store.resolve("acme", "law").version == 2
    assert [(v.version, v.active) for v in store.versions("acme", "law")] == [(1, False), (2, True)]
    assert [v.ref for v in store.list_versions("acme")] == ["law@2"]


def test_the_same_content_again_is_the_version_it_was(store: AdapterStore, publish: Publish) -> None:
    first = publish(seed=1)
    publish(seed=2)
    again = publish(seed=1)
    assert (again.version, again.digest, again.active) == (1, first.digest, True)
    assert store.resolve("acme", "law").version == 1
    assert len(store.versions("acme", "law")) == 2


def test_a_version_published_without_activation_waits(store: AdapterStore, publish: Publish) -> None:
    publish(seed=1)
    assert not publish(seed=2, activate=False).active
    assert store.resolve("acme", "law").version == 1
    store.aliases.activate("acme", "law", 2)
    assert store.resolve("acme", "law").version == 2
    with pytest.raises(NotFound):
        store.aliases.activate("acme", "law", 3)


@pytest.mark.parametrize(
    "ref", ["nothing", "law@2", "law@0", "law@01", "law@", "@1", "acme/law", "law@1@1", "law@" + "9" * 30]
)
def test_a_name_that_means_nothing_is_not_found(ref: str, store: AdapterStore, publish: Publish) -> None:
    publish()
    with pytest.raises(NotFound) as caught:
        store.resolve("acme", ref)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("tenant", ["\ud800", "a\0b", "", "a b"])
def test_a_tenant_that_no_name_could_be_is_not_found(tenant: str, store: AdapterStore, publish: Publish) -> None:
    publish()
    for action in (
        lambda: store.resolve(tenant, "law"),
        lambda: store.delete(tenant, "law"),
        lambda: store.tenants.get(tenant),
        lambda: store.tenants.delete(tenant),
    ):
        with pytest.raises(NotFound):
            action()
    assert store.versions(tenant, "law") == store.versions("acme", tenant) == []
    assert store.quotas.get(tenant) == Quotas()


def test_a_tenant_sees_only_its_own(store: AdapterStore, publish: Publish) -> None:
    store.tenants.create("other")
    publish()
    with pytest.raises(NotFound):
        store.resolve("other", "law")
    with pytest.raises(NotFound):
        store.delete("other", "law")
    assert store.list_versions("other") == []
    assert [v.tenant for v in store.list_versions()] == ["acme"]


def test_meaning_makes_the_digest(publish: Publish) -> None:
    plain = publish("a", r=4, lora_alpha=8)
    assert publish("b", base_model_name_or_path="elsewhere", lora_dropout=0.3).digest == plain.digest
    assert publish("c", lora_alpha=99, alpha_pattern={"q_proj": 8, "v_proj": 8}).digest == plain.digest
    assert publish("d", target_modules="all-linear").digest == plain.digest
    assert publish("e", lora_alpha=4, use_rslora=True).digest == plain.digest  # 4 / sqrt(4) = 8 / 4
    assert publish("f", target_modules=["v_proj", "q_proj"]).digest == plain.digest
    assert publish("g", lora_alpha=9).digest != plain.digest
    assert publish("h", seed=1).digest != plain.digest


def test_the_digest_ignores_file_order_and_metadata_but_not_dtype_or_base(store: AdapterStore, tmp_path: Path) -> None:
    tensors = lora_tensors(tiny_base())

    def digest(data: bytes, base: BaseDescription) -> str:
        weights = write(tmp_path / "w", data)
        return store.publish(tenant="acme", name="x", config=config_bytes(), weights=weights, base=base).digest

    plain = digest(safetensors_bytes(tensors), tiny_base())
    assert digest(safetensors_bytes(dict(reversed(tensors.items())), {"note": "hello"}), tiny_base()) == plain
    halves: Any = {name: array.astype(np.float16) for name, array in tensors.items()}
    wide: Any = {name: array.astype(np.float32) for name, array in halves.items()}
    assert digest(safetensors_bytes(halves), tiny_base()) != digest(safetensors_bytes(wide), tiny_base())
    assert digest(safetensors_bytes(tensors), tiny_base(digest="sha256:" + "c" * 64)) != plain


def test_the_digest_is_the_same_in_every_release(store: AdapterStore, tmp_path: Path) -> None:
    base = tiny_base(dtype="bfloat16")
    tensors: Any = {
        name: (np.arange(array.size, dtype=np.float32).reshape(array.shape) / 64).astype(np.float16)
        for name, array in lora_tensors(base).items()
    }
    weights = write(tmp_path / "w", safetensors_bytes(tensors))
    version = store.publish(tenant="acme", name="x", config=config_bytes(), weights=weights, base=base)
    assert version.digest == "sha256:2faf4493a78d6ae71bddc0b3ed12ed8854eaf3def74a9f678b42f78423879501"


def test_tenants_share_a_blob_and_deleting_one_keeps_it(
    store: AdapterStore, publish: Publish, data_dir: Path, base: BaseDescription
) -> None:
    store.tenants.create("other")
    mine, theirs = publish(tenant="acme"), publish(tenant="other")
    assert mine.digest == theirs.digest
    assert blobs_in(data_dir) == {mine.digest}
    assert store.delete("acme", "law") == []
    assert store.load_packed(theirs.digest, base).digest == theirs.digest
    assert store.delete("other", "law") == [mine.digest]
    assert blobs_in(data_dir) == set()
    with pytest.raises(NotFound):
        store.load_packed(theirs.digest, base)


def test_deleting_one_version_keeps_the_others(store: AdapterStore, publish: Publish, data_dir: Path) -> None:
    first, second = publish(seed=1), publish(seed=2)
    assert store.delete("acme", "law@1") == [first.digest]
    assert store.resolve("acme", "law") == second
    assert blobs_in(data_dir) == {second.digest}
    with pytest.raises(NotFound):
        store.resolve("acme", "law@1")
    with pytest.raises(NotFound):
        store.delete("acme", "law@1")


def test_deleting_the_active_version_activates_no_other(store: AdapterStore, publish: Publish) -> None:
    publish(seed=1)
    publish(seed=2)
    store.delete("acme", "law@2")
    with pytest.raises(NotFound):
        store.resolve("acme", "law")
    assert store.resolve("acme", "law@1").version == 1
    assert store.list_versions("acme") == []


def test_a_version_number_is_never_given_twice(store: AdapterStore, publish: Publish) -> None:
    publish(seed=1)
    store.delete("acme", "law")
    assert store.versions("acme", "law") == []
    assert publish(seed=2).version == 2
    with pytest.raises(NotFound):
        store.resolve("acme", "law@1")


def test_uploaded_files_come_back_byte_for_byte(store: AdapterStore, publish: Publish, tmp_path: Path) -> None:
    store.tenants.create("other")
    mine = publish(base_model_name_or_path="/home/acme/secret")
    theirs = publish(tenant="other", base_model_name_or_path="base")
    assert mine.digest == theirs.digest
    assert store.config_of(mine) == config_bytes(base_model_name_or_path="/home/acme/secret")
    assert store.config_of(theirs) == config_bytes(base_model_name_or_path="base")
    assert store.weights_of(mine.digest).read_bytes() == (tmp_path / "upload.safetensors").read_bytes()
    with pytest.raises(NotFound):
        store.config_of(replace(mine, version=9))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
        lambda path: (path.parent / "adapter_config.json").write_bytes(config_bytes(lora_alpha=9)),
        lambda path: (path.parent / "adapter_config.json").unlink(),
    ],
)
def test_a_damaged_blob_is_never_served_and_publishing_again_heals_it(
    damage: Callable[[Path], object], store: AdapterStore, publish: Publish, base: BaseDescription
) -> None:
    version = publish()
    sound = store.load_packed(version.digest, base)
    damage(store.weights_of(version.digest))
    with pytest.raises(BlobDamaged):
        store.verify(version.digest, base)
    drop_packed_forms(store.weights_of(version.digest).parent)
    with pytest.raises(BlobDamaged):
        store.load_packed(version.digest, base)
    assert publish() == version
    store.verify(version.digest, base)
    assert torch.equal(store.load_packed(version.digest, base).buffer, sound.buffer)


def test_another_base_is_not_damage(store: AdapterStore, publish: Publish) -> None:
    version = publish()
    with pytest.raises(AdapterUnavailable) as caught:
        store.load_packed(version.digest, tiny_base(digest="sha256:" + "c" * 64))
    assert caught.value.code == "wrong_base"


def test_a_lowered_limit_does_not_disown_what_was_accepted(
    store: AdapterStore, publish: Publish, data_dir: Path, base: BaseDescription
) -> None:
    version = publish()
    stricter = AdapterStore.open(data_dir, limits=AdapterLimits(max_rank=2, max_bytes=100))
    assert stricter.load_packed(version.digest, base).digest == version.digest
    stricter.close()


def test_the_number_of_versions_is_limited(data_dir: Path, base: BaseDescription, tmp_path: Path) -> None:
    store = AdapterStore.open(data_dir, limits=AdapterLimits(max_versions_per_tenant=2))
    store.tenants.create("acme")
    for seed in (0, 1, 1, 0, 2):
        upload = {
            "tenant": "acme",
            "name": f"n{seed}",
            "config": config_bytes(),
            "weights": write(tmp_path / "w", safetensors_bytes(lora_tensors(base, seed=seed))),
            "base": base,
        }
        if seed < 2:
            store.publish(**upload)  # type: ignore[arg-type]
    with pytest.raises(Conflict) as caught:
        store.publish(**upload)  # type: ignore[arg-type]
    assert caught.value.code == "too_many_adapters"
    store.close()


def test_another_processes_writes_are_seen_within_a_second(
    store: AdapterStore, publish: Publish, data_dir: Path
) -> None:
    reader = AdapterStore.open(data_dir)
    publish(seed=1)
    assert reader.resolve("acme", "law").version == 1
    publish(seed=2)
    assert eventually(lambda: reader.resolve("acme", "law").version == 2)
    store.aliases.activate("acme", "law", 1)
    assert eventually(lambda: reader.resolve("acme", "law").version == 1)
    store.delete("acme", "law")

    def is_gone() -> bool:
        try:
            reader.resolve("acme", "law")
        except NotFound:
            return True
        return False

    assert eventually(is_gone)
    reader.close()


def test_everything_is_there_after_a_restart(
    store: AdapterStore, publish: Publish, data_dir: Path, base: BaseDescription
) -> None:
    version = publish()
    store.close()
    reopened = AdapterStore.open(data_dir)
    assert reopened.resolve("acme", "law") == version
    assert reopened.load_packed(version.digest, base).digest == version.digest
    reopened.close()


def test_bases_are_remembered_the_last_first(store: AdapterStore) -> None:
    first, second = tiny_base(), tiny_base(digest="sha256:" + "c" * 64)
    assert store.bases() == []
    for base in (first, second, first):
        store.remember_base(base)
    assert store.bases() == [first, second]


def test_sweeping_removes_only_what_nobody_has(store: AdapterStore, publish: Publish, data_dir: Path) -> None:
    kept = publish(seed=1)
    orphan = data_dir / "blobs" / "ab" / ("ab" * 32)
    left = data_dir / "staging" / "left"
    for folder in (orphan, left):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_bytes(b"{}")
    trash = data_dir / "staging" / "trash"  # a training file of a cache
    trash.write_bytes(b"{}")
    assert store.sweep() == type(store.sweep())(0, [])
    swept = store.sweep(grace_s=-1)
    assert (swept.num_staged, swept.blobs) == (2, ["sha256:" + "ab" * 32])
    assert blobs_in(data_dir) == {kept.digest}
    assert not orphan.exists()
    assert not left.exists()
    assert not trash.exists()


def test_a_database_of_a_later_program_is_refused(store: AdapterStore, data_dir: Path) -> None:
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError) as caught:
        AdapterStore.open(data_dir)
    assert caught.value.code == "database_newer"


def test_resolving_is_cheap_enough_for_every_request(store: AdapterStore, publish: Publish) -> None:
    publish()
    store.resolve("acme", "law")
    assert quiet_s(lambda: [store.resolve("acme", "law") for _ in range(2000)]) / 2000 < 50e-6


def test_a_file_that_the_caller_gives_away_is_moved_and_a_refused_one_stays(
    store: AdapterStore, base: BaseDescription, data_dir: Path, tmp_path: Path
) -> None:
    spool = write(data_dir / "spool", safetensors_bytes(lora_tensors(base)))
    inode = spool.stat().st_ino
    with pytest.raises(AdapterRejected):
        store.publish(tenant="acme", name="law", config=b"{}", weights=spool, base=base, takes_file=True)
    assert spool.stat().st_ino == inode
    given = {"tenant": "acme", "name": "law", "config": config_bytes(), "base": base}
    version = store.publish(weights=spool, takes_file=True, **given)
    assert not spool.exists()
    assert store.weights_of(version.digest).stat().st_ino == inode
    copied = write(tmp_path / "copied", safetensors_bytes(lora_tensors(base)))
    assert store.publish(weights=copied, **given) == version
    assert copied.exists()
