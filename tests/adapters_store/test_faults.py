"""Every change of a store, with a fault at each of its file operations, at each of its statements and at its commit: it
is made or it is not, and can be made again. No longer form: every k of every change is tried."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from adapters_store.accounts.keys import KeySpec
from adapters_store.accounts.records import Quotas
from adapters_store.accounts.usage import UsageCounts, UsageKey
from adapters_store.errors import StoreError
from adapters_store.storage.schema import metadata
from adapters_store.store import AdapterStore
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base, write
from support.stores.recording_files import RecordingFiles

BASE = tiny_base()
Change = Callable[[AdapterStore, Path], object]
NEVER = 1 << 30


def publish(store: AdapterStore, folder: Path, seed: int, *, activate: bool = True) -> Any:
    weights = write(folder / f"upload-{seed}", safetensors_bytes(lora_tensors(BASE, seed=seed)))
    return store.publish(
        tenant="acme", name="law", config=config_bytes(), weights=weights, base=BASE, activate=activate
    )


def repair(store: AdapterStore, folder: Path) -> object:
    """Push content whose blob is damaged."""
    store.weights_of(store.versions("acme", "law")[0].digest).write_bytes(b"damaged")
    return publish(store, folder, 1)


def quarantine(store: AdapterStore, code: str) -> object:
    return store.quarantine.put(store.versions("acme", "law")[0].digest, code, "x")


def sweep(store: AdapterStore, _folder: Path) -> object:
    """Take away what a killed process left."""
    return store.sweep(grace_s=-1)


CHANGES: dict[str, Change] = {
    "publish new": lambda store, folder: publish(store, folder, 9),
    "publish known": lambda store, folder: publish(store, folder, 1),
    "upload only": lambda store, folder: publish(store, folder, 9, activate=False),
    "heal": lambda store, folder: publish(store, folder, 1),
    "repair": repair,
    "activate": lambda store, _: store.aliases.activate("acme", "law", 1),
    "canary": lambda store, _: store.aliases.set_canary("acme", "law", 1, 10),
    "end canary": lambda store, _: store.aliases.set_canary("acme", "law", 1, 0),
    "promote": lambda store, _: store.aliases.promote("acme", "law"),
    "unload": lambda store, _: store.aliases.unload("acme", "law", 2),
    "unload all": lambda store, _: store.aliases.unload("acme", "law"),
    "roll back": lambda store, _: store.aliases.roll_back("acme", "law"),
    "roll back a canary": lambda store, _: store.aliases.roll_back("acme", "law"),
    "delete one with a canary": lambda store, _: store.delete("acme", "law@2"),
    "delete one": lambda store, _: store.delete("acme", "law@1"),
    "delete all": lambda store, _: store.delete("acme", "law"),
    "sweep": sweep,
    "create tenant": lambda store, _: store.tenants.create("globex"),
    "create key": lambda store, _: store.tenants.create_key("acme", KeySpec()),
    "rotate keys": lambda store, _: store.tenants.rotate_key("acme"),
    "rotate one key": lambda store, _: store.tenants.rotate_key("acme", overlap_s=60, key_id=1),
    "revoke key": lambda store, _: store.tenants.revoke_key("acme", 1),
    "disable": lambda store, _: store.tenants.set_disabled("acme", True),
    "delete tenant": lambda store, _: store.tenants.delete("acme"),
    "set quotas": lambda store, _: store.quotas.set("acme", Quotas(max_concurrent=3)),
    "replace quotas": lambda store, _: store.quotas.set("acme", Quotas(weight=2.0)),
    "use": lambda store, _: store.usage.add({UsageKey("2026-01-01", "acme", "base"): UsageCounts(1, 2, 0, 3)}),
    "quarantine": lambda store, _: quarantine(store, "test"),
    "release": lambda store, _: store.quarantine.release(store.versions("acme", "law")[0].digest),
    "remember base": lambda store, _: store.remember_base(BASE),
}
SET_UPS: dict[str, Callable[[AdapterStore], object]] = {
    **dict.fromkeys(
        ("end canary", "promote", "roll back a canary", "delete one with a canary"),
        lambda store: store.aliases.set_canary("acme", "law", 1, 10),
    ),
    "replace quotas": lambda store: store.quotas.set("acme", Quotas(max_concurrent=3)),
    "release": lambda store: quarantine(store, "test"),
    "heal": lambda store: quarantine(store, "blob_damaged"),
}
UPLOADS = {"publish new", "publish known", "upload only", "heal", "repair"}
WITH_FILES = UPLOADS | {"delete one", "delete all", "delete one with a canary", "sweep", "delete tenant"}
WITHOUT_COMMIT = {"sweep"}


class Fault:
    """Raises at the chosen file operation."""

    def __init__(self) -> None:
        self.files = RecordingFiles(self._at_step)
        self.at_step = NEVER
        self.is_over = False

    def _at_step(self, count: int) -> None:
        if count == self.at_step:
            self.is_over = True
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def prepared(data_dir: Path, folder: Path, fault: Fault, what: str) -> AdapterStore:
    """Two versions of one adapter, a blob that nobody has, and what the change needs."""
    store = AdapterStore.open(data_dir, files=fault.files)
    store.tenants.create("acme")
    for seed in (1, 2):
        publish(store, folder, seed)
    orphan = data_dir / "blobs" / "ab" / ("ab" * 32)
    orphan.mkdir(parents=True, exist_ok=True)
    SET_UPS.get(what, lambda _: None)(store)
    return store


def rows_of(store: AdapterStore) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table."""
    with store.database.read() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(table.select())] for table in metadata.sorted_tables
        }


def check_sound(data_dir: Path) -> None:
    """Opened anew: every row's bytes are whole, and a sweep leaves blobs for rows only."""
    store = AdapterStore.open(data_dir)
    versions = store.versions("acme", "law")
    for version in versions:
        store.verify(version.digest, BASE)
    store.sweep(grace_s=-1)
    assert {f"sha256:{blob.name}" for blob in (data_dir / "blobs").glob("??/*")} == {v.digest for v in versions}
    assert list((data_dir / "staging").iterdir()) == []
    store.close()


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_whose_kth_file_operation_fails_leaves_the_store_sound(
    what: str, data_dir: Path, tmp_path: Path
) -> None:
    change, step = CHANGES[what], 0
    while True:
        step += 1
        fault, own = Fault(), data_dir / str(step)
        store = prepared(own, tmp_path, fault, what)
        fault.at_step = len(fault.files.steps) + step
        try:
            change(store, tmp_path)
        except OSError as error:
            assert error.errno == errno.EIO  # noqa: PT017  the loop ends where nothing fails any more
        fault.at_step = NEVER
        if not fault.is_over:
            store.close()
            break
        if what in UPLOADS:
            publish(store, tmp_path, 1)  # also heals what a repair had begun
        store.close()
        check_sound(own)
    assert (step > 1) == (what in WITH_FILES)


@pytest.mark.parametrize("what", sorted(CHANGES.keys() - WITHOUT_COMMIT))
def test_a_change_whose_kth_statement_fails_was_never_made(what: str, data_dir: Path, tmp_path: Path) -> None:
    """Each statement in turn, on one store: what was begun before it is undone."""
    store = prepared(data_dir, tmp_path, Fault(), what)
    before, num_writes = rows_of(store), 0
    to_come = NEVER

    def fail(connection: Any, *_: object) -> None:
        nonlocal to_come
        if connection.get_execution_options().get("multilora_write"):
            to_come -= 1
            if to_come == 0:
                raise OperationalError("INSERT", {}, sqlite3.OperationalError("disk I/O error"))

    event.listen(store.database.engine, "before_cursor_execute", fail)
    while to_come > 0:
        num_writes += 1
        to_come = num_writes
        try:
            CHANGES[what](store, tmp_path)
        except StoreError as error:
            assert error.code == "disk_full"  # noqa: PT017  the loop ends where nothing fails any more
            to_come = NEVER
            assert rows_of(store) == before, f"statement {num_writes}"
        else:
            break
    event.remove(store.database.engine, "before_cursor_execute", fail)
    assert num_writes > 2
    assert rows_of(store) != before
    store.close()


@pytest.mark.parametrize("what", sorted(CHANGES.keys() - WITHOUT_COMMIT))
def test_a_change_whose_commit_fails_was_never_made_and_can_be_made_again(
    what: str, data_dir: Path, tmp_path: Path
) -> None:
    store = prepared(data_dir, tmp_path, Fault(), what)
    engine = store.database.engine
    before = rows_of(store)

    def fail(connection: Any) -> None:
        if connection.get_execution_options().get("multilora_write"):
            raise OperationalError("COMMIT", {}, sqlite3.OperationalError("disk I/O error"))

    event.listen(engine, "commit", fail)
    with pytest.raises(StoreError) as caught:
        CHANGES[what](store, tmp_path)
    assert caught.value.code == "disk_full"
    event.remove(engine, "commit", fail)
    assert rows_of(store) == before
    CHANGES[what](store, tmp_path)
    assert rows_of(store) != before
    store.close()
    if what != "delete tenant":
        check_sound(data_dir)
