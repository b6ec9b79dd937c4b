"""The machine may stop at any step of a publish or a delete: no row without its blob, and no half blob."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import NotFound, StoreError
from adapters_store.store import AdapterStore
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base, write
from support.stores.recording_files import RecordingFiles

BASE = tiny_base()
fork = multiprocessing.get_context("fork")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write(tmp_path / "w", safetensors_bytes(lora_tensors(BASE)))


def publish(store: AdapterStore, weights: Path) -> AdapterDigest:
    return store.publish(tenant="acme", name="law", config=config_bytes(), weights=weights, base=BASE).digest


def in_a_process_of_its_own(action: Callable[[], None]) -> int:
    process = fork.Process(target=action)
    process.start()
    process.join(timeout=300)
    assert process.exitcode is not None
    return process.exitcode


def check_sound(data_dir: Path) -> list[AdapterDigest]:
    """Every row loads and every blob is whole; returns the digests that have rows."""
    store = AdapterStore.open(data_dir)
    versions = store.list_versions()
    for version in versions:
        store.verify(version.digest, BASE)
        assert store.load_packed(version.digest, BASE).digest == version.digest
    for folder in (data_dir / "blobs").glob("??/*"):
        assert store._loader.is_intact(AdapterDigest(f"sha256:{folder.name}"), BASE)
    store.sweep(grace_s=-1)
    assert list((data_dir / "staging").iterdir()) == []
    assert {f"sha256:{folder.name}" for folder in (data_dir / "blobs").glob("??/*")} == {v.digest for v in versions}
    store.close()
    return [version.digest for version in versions]


def prepared(data_dir: Path, *uploads: Path) -> int:
    """A store with a tenant and these adapters; returns the file operations that opening it takes."""
    files = RecordingFiles()
    store = AdapterStore.open(data_dir, files=files)
    steps = len(files.steps)
    store.tenants.create("acme")
    for upload in uploads:
        publish(store, upload)
    store.close()
    return steps


def steps_of(data_dir: Path, action: Callable[[AdapterStore], object]) -> list[tuple[str, str]]:
    """The file operations of an action, and "commit" where the database commits a write."""
    files = RecordingFiles()
    store = AdapterStore.open(data_dir, files=files)
    files.steps.clear()
    event.listen(store.database.engine, "commit", lambda _: files.steps.append(("commit", "")))
    action(store)
    store.close()
    return files.steps


def test_bytes_are_durable_before_they_are_named_and_named_before_the_row(data_dir: Path, weights: Path) -> None:
    prepared(data_dir)
    steps = steps_of(data_dir, lambda store: publish(store, weights))
    operations = [operation for operation, _ in steps]
    rename = operations.index("rename")
    row = len(operations) - 1 - operations[::-1].index("commit")
    synced_before = {name for operation, name in steps[:rename] if operation == "sync_file"}
    assert synced_before == {"adapter_config.json", "adapter_model.safetensors"}
    assert operations[rename - 1 : rename + 2].count("sync_folder") >= 1
    assert "sync_folder" in operations[:rename]
    assert operations[rename + 1] == "sync_folder"
    assert steps[rename + 1][1] == steps[rename][1][:2]
    assert row > rename + 1


def killed_at(step: int) -> Callable[[int], None]:
    def at_step(count: int) -> None:
        if count == step:
            os._exit(9)

    return at_step


def test_a_publish_killed_at_any_step_leaves_the_store_sound(data_dir: Path, weights: Path, tmp_path: Path) -> None:
    opening = prepared(data_dir)
    operations = [o for o, _ in steps_of(tmp_path / "rehearsal", _publish_in_new_store(weights)) if o != "commit"]
    assert operations.count("rename") == 1
    for step in range(opening + 1, opening + len(operations) + 1):
        for torn in (None, step):

            def killed(step: int = step, torn: int | None = torn) -> None:
                at_step = killed_at(step) if torn is None else (lambda _: None)
                publish(AdapterStore.open(data_dir, files=RecordingFiles(at_step, torn=torn)), weights)

            code = in_a_process_of_its_own(killed)
            if torn is None:
                assert code == 9, f"step {step} was never reached"
            if code == 9:
                assert check_sound(data_dir) == []
            else:
                _delete_law(data_dir)
    store = AdapterStore.open(data_dir)
    assert publish(store, weights) == store.resolve("acme", "law").digest
    store.close()
    assert len(check_sound(data_dir)) == 1


def _publish_in_new_store(weights: Path) -> Callable[[AdapterStore], object]:
    def action(store: AdapterStore) -> None:
        store.tenants.create("acme")
        publish(store, weights)

    return action


def _delete_law(data_dir: Path) -> None:
    store = AdapterStore.open(data_dir)
    store.delete("acme", "law")
    store.close()


@pytest.mark.parametrize("moment", ["before commit", "after commit"])
def test_a_publish_killed_around_the_commit_leaves_the_store_sound(moment: str, data_dir: Path, weights: Path) -> None:
    prepared(data_dir)

    def killed() -> None:
        store = AdapterStore.open(data_dir)
        if moment == "before commit":
            commits_of_writes(store, lambda: os._exit(9))
        else:
            store.database.on_change(lambda: os._exit(9))
        publish(store, weights)

    assert in_a_process_of_its_own(killed) == 9
    assert len(check_sound(data_dir)) == (1 if moment == "after commit" else 0)


def commits_of_writes(store: AdapterStore, action: Callable[[], None]) -> None:
    def on_commit(connection: Any) -> None:
        if connection.get_execution_options().get("multilora_write"):
            action()

    event.listen(store.database.engine, "commit", on_commit)


def test_a_delete_killed_at_any_step_leaves_the_store_sound(data_dir: Path, weights: Path) -> None:
    opening = prepared(data_dir, weights)
    for step in (opening + 1, opening + 2):

        def killed(step: int = step) -> None:
            AdapterStore.open(data_dir, files=RecordingFiles(killed_at(step))).delete("acme", "law")

        assert in_a_process_of_its_own(killed) == 9
        assert check_sound(data_dir) == []
        store = AdapterStore.open(data_dir)
        publish(store, weights)
        store.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_file_operation_is_an_error_and_leaves_nothing_behind(
    error: int, data_dir: Path, weights: Path
) -> None:
    opening = prepared(data_dir)
    step = opening
    while True:
        step += 1

        def fail(count: int, step: int = step) -> None:
            if count == step:
                raise OSError(error, os.strerror(error))

        files = RecordingFiles(fail)
        store = AdapterStore.open(data_dir, files=files)
        try:
            publish(store, weights)
        except StoreError as answer:
            assert error != errno.EIO
            failure: Exception = answer
            code = answer.code
        except OSError as answer:
            assert error == errno.EIO
            failure, code = answer, ""
        else:
            break
        finally:
            store.close()
        assert code == ("" if error == errno.EIO else "disk_full"), failure
        assert list((data_dir / "staging").iterdir()) == []
        assert check_sound(data_dir) == []
    assert step - opening > 8
    assert len(check_sound(data_dir)) == 1


def test_a_full_disk_under_the_database_is_an_answer(data_dir: Path, weights: Path) -> None:
    prepared(data_dir)
    store = AdapterStore.open(data_dir)
    with store.database.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()

    def shrink(connection: Any, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}")

    event.listen(store.database.engine, "checkout", shrink)
    big_config = config_bytes(base_model_name_or_path="x" * 500_000)
    with pytest.raises(StoreError) as caught:
        store.publish(tenant="acme", name="law", config=big_config, weights=weights, base=BASE)
    assert caught.value.code == "disk_full"
    with pytest.raises(NotFound):
        store.resolve("acme", "law")
    store.close()
    assert check_sound(data_dir) == []


def test_a_damaged_blob_being_replaced_may_be_interrupted(data_dir: Path, weights: Path) -> None:
    opening = prepared(data_dir, weights)
    store = AdapterStore.open(data_dir)
    digest = store.resolve("acme", "law").digest
    path = store.weights_of(digest)
    step = opening
    while True:
        step += 1
        if path.exists():
            path.write_bytes(b"damaged")

        def killed(step: int = step) -> None:
            publish(AdapterStore.open(data_dir, files=RecordingFiles(killed_at(step))), weights)

        if in_a_process_of_its_own(killed) == 0:
            break
        publish(store, weights)
        store.verify(digest, BASE)
    store.close()
    assert check_sound(data_dir) == [digest]
