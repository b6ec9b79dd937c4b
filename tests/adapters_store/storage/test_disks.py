"""Real full disks, a real limit on file sizes, and a disk that refuses writing: an answer each, and reading goes on."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from adapters_store import filesystem
from adapters_store.errors import StoreError
from adapters_store.filesystem import Filesystem
from adapters_store.store import AdapterStore
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base, write
from support.stores.disks import fill_up, small_disk

BASE = tiny_base()
fork = multiprocessing.get_context("fork")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def publish(store: AdapterStore, folder: Path, seed: int) -> str:
    weights = write(folder / f"upload-{seed}", safetensors_bytes(lora_tensors(BASE, seed=seed)))
    return store.publish(tenant="acme", name=f"a{seed}", config=config_bytes(), weights=weights, base=BASE).digest


def test_a_full_disk_refuses_uploads_serves_what_is_there_and_takes_more_once_there_is_room(
    disk: Path, tmp_path: Path
) -> None:
    store = AdapterStore.open(disk / "data", reserve_bytes=6 << 20)
    (disk / "filler").write_bytes(b"x" * (9 << 20))
    key = store.tenants.create("acme").api_key
    published: dict[str, str] = {}

    def publish_on() -> None:
        for seed in range(200):
            published[f"a{seed}"] = publish(store, tmp_path, seed)

    with pytest.raises(StoreError) as caught:
        publish_on()
    assert caught.value.code == "disk_full"
    assert len(published) > 2
    assert list((disk / "data" / "staging").iterdir()) == []
    for name, digest in published.items():
        assert store.resolve("acme", name).digest == digest
        assert store.load_packed(store.resolve("acme", name).digest, BASE).digest == digest
    assert store.tenants.authenticate(key) is not None
    assert store.check_integrity().quarantined == []
    while len(published) > 2:
        store.delete("acme", published.popitem()[0])
    (disk / "filler").unlink()
    assert publish(store, tmp_path, 500)
    store.close()


def test_a_disk_full_of_other_things_refuses_every_write_with_a_code(disk: Path, tmp_path: Path) -> None:
    store = AdapterStore.open(disk / "data", reserve_bytes=0)
    store.tenants.create("acme")
    digest = publish(store, tmp_path, 1)
    fill_up(disk / "filler")
    codes = set()
    for _ in range(200):  # the write-ahead log may have some room of its own left
        try:
            store.tenants.rotate_key("acme")
        except StoreError as error:
            codes.add(error.code)
            break
    with pytest.raises(StoreError) as caught:
        publish(store, tmp_path, 2)
    assert codes | {caught.value.code} == {"disk_full"}
    assert store.resolve("acme", "a1").digest == digest
    store.close()
    (disk / "filler").unlink()
    again = AdapterStore.open(disk / "data")
    assert again.load_packed(again.resolve("acme", "a1").digest, BASE).digest == digest
    again.close()


def test_a_limit_on_file_sizes_is_a_full_disk(data_dir: Path, tmp_path: Path) -> None:
    store = AdapterStore.open(data_dir)
    store.tenants.create("acme")
    store.close()

    def limited() -> None:
        own = AdapterStore.open(data_dir)
        weights = write(tmp_path / "upload", safetensors_bytes(lora_tensors(BASE)))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        code = 1
        try:
            own.publish(tenant="acme", name="a", config=config_bytes(), weights=weights, base=BASE)
        except StoreError as error:
            code = 0 if error.code == "disk_full" else 2
        os._exit(code)

    process = fork.Process(target=limited)
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
    again = AdapterStore.open(data_dir)
    assert (again.list_versions(), again.check_integrity().quarantined) == ([], [])
    again.close()


class RefusingFiles(Filesystem):
    """Real files until `error` is set; then every operation that writes is refused with it."""

    error: int | None = None

    def _refuse(self) -> None:
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))

    def make_folder(self, path: Path) -> None:
        self._refuse()
        super().make_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        self._refuse()
        super().rename(source, target)


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_read_only_disk_refuses_changes_with_a_code_and_goes_on_serving(
    error: int, data_dir: Path, tmp_path: Path
) -> None:
    files = RefusingFiles()
    store = AdapterStore.open(data_dir, files=files)
    key = store.tenants.create("acme").api_key
    digest = publish(store, tmp_path, 1)

    def forbid(connection: object, *_: object) -> None:
        connection.execute("PRAGMA query_only = ON")  # type: ignore[attr-defined]

    files.error = error
    event.listen(store.database.engine, "checkout", forbid)
    for change in (
        lambda: publish(store, tmp_path, 2),
        lambda: store.delete("acme", "a1"),
        lambda: store.tenants.create("globex"),
        lambda: store.tenants.rotate_key("acme"),
        lambda: store.audit.record("x"),
    ):
        with pytest.raises(StoreError) as caught:
            change()
        assert caught.value.code == "read_only"
    assert store.load_packed(store.resolve("acme", "a1").digest, BASE).digest == digest
    assert store.tenants.authenticate(key) is not None
    assert len(store.list_versions()) == 1
    store.close()


def test_a_read_only_lock_file_still_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    really_open = os.open

    def read_only(path: Path, flags: int, *mode: int, **options: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return really_open(path, flags, *mode, **options)

    monkeypatch.setattr("adapters_store.filesystem.os.open", read_only)
    with (
        filesystem.file_lock(lock, exclusive=True),
        lock.open("rb") as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
