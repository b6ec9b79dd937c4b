"""Training files of an object store: one fetch each, and none waits for another file's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.errors import StoreError
from adapters_store.filesystem import file_sha256, free_disk_bytes
from adapters_store.remote.object_blobs import ObjectData
from adapters_store.remote.settings import RemoteSettings
from adapters_store.store import AdapterStore
from support.stores.disks import small_disk

STRIPES = 64  # files were fetched one after the other if their digests were equal modulo this


@pytest.fixture
def data(tmp_path: Path) -> Iterator[ObjectData]:
    store = AdapterStore.open(tmp_path / "data", remote=RemoteSettings(url=f"file://{tmp_path}/bucket"))
    assert store.remote is not None
    root = tmp_path / "data" / "files"
    (root / "staging").mkdir(parents=True)
    yield ObjectData(root, store.remote)
    store.close()


def digest_of(path: Path) -> str:
    return f"sha256:{file_sha256(path)}"


def put(data: ObjectData, folder: Path, number: int) -> str:
    source = folder / f"source-{number}"
    source.write_bytes(str(number).encode())
    digest = digest_of(source)
    data.put_new(source, digest)
    return digest


def test_a_slow_fetch_delays_no_other_file_and_its_own_is_fetched_once(data: ObjectData, tmp_path: Path) -> None:
    slow = put(data, tmp_path, 0)
    other = next(each for n in range(1, 5000) if hash(each := put(data, tmp_path, n)) % STRIPES == hash(slow) % STRIPES)
    begun, allowed, reads = threading.Event(), threading.Event(), []

    def slowly(path: Path) -> str:
        reads.append(path)
        begun.set()
        allowed.wait(60)
        return digest_of(path)

    target = tmp_path / "data" / "files" / "aa" / "slow"
    threads = [threading.Thread(target=data.get, args=(slow, target, slowly)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    beside = threading.Thread(target=data.get, args=(other, tmp_path / "data" / "files" / "bb" / "other", digest_of))
    beside.start()
    beside.join(30)
    was_delayed = beside.is_alive()
    allowed.set()
    for thread in threads:
        thread.join(60)
    assert not was_delayed
    assert target.read_bytes() == b"0"
    assert len(reads) == 1


MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def test_on_a_full_disk_a_fetch_evicts_what_was_not_used_longest(small: Path, tmp_path: Path) -> None:
    """16 MiB, of which 6 stay free: three files of 3 MiB fit, another one takes the place of the oldest."""
    settings = RemoteSettings(url=f"file://{tmp_path}/bucket")
    store = AdapterStore.open(small / "data", remote=settings, reserve_bytes=6 * MIB)
    assert store.remote is not None
    root = small / "data" / "files"
    (root / "staging").mkdir(parents=True)
    data = ObjectData(root, store.remote)
    targets = []
    for number in range(5):
        source = tmp_path / f"large-{number}"
        source.write_bytes(bytes([number]) * 3 * MIB)
        digest = digest_of(source)
        data.put_new(source, digest)
        targets.append(root / "aa" / str(number))
        data.get(digest, targets[-1], digest_of)
        assert targets[-1].read_bytes() == source.read_bytes()
        assert free_disk_bytes(small) >= 6 * MIB
    assert [each.exists() for each in targets] == [False, False, True, True, True]
    (source := tmp_path / "huge").write_bytes(b"x" * 20 * MIB)
    data.put_new(source, digest_of(source))
    with pytest.raises(StoreError, match=f"no room for the {20 * MIB} bytes .* {6 * MIB} must stay free"):
        data.get(digest_of(source), root / "aa" / "huge", digest_of)
    assert list((root / "staging").iterdir()) == []
    assert [each.exists() for each in targets] == [False, False, True, True, True], "nothing was evicted in vain"
    store.close()


def test_a_fetch_that_fails_lets_the_next_one_try(data: ObjectData, tmp_path: Path) -> None:
    digest = put(data, tmp_path, 0)
    target = tmp_path / "data" / "files" / "aa" / "law"

    def broken(_: Path) -> str:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        data.get(digest, target, broken)
    data.get(digest, target, digest_of)
    assert target.read_bytes() == b"0"
