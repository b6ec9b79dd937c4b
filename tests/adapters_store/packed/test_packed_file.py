"""The packed form is a shortcut: with it, without it, or with it damaged, the same adapter is loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters_store.base.description import BaseDescription
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.layout import PackedAdapter
from adapters_store.packed.packed_file import UNUSED_S, keep_packed, read_packed
from adapters_store.store import AdapterStore
from adapters_store.versions.records import AdapterVersion
from lora_kernels import background
from lora_kernels.background import Pace, TimeSlices
from support.models.adapter_files import tiny_base

Publish = Callable[..., AdapterVersion]

pytestmark = pytest.mark.skipif(not background.is_available(), reason="no C compiler")


@pytest.fixture
def version(publish: Publish) -> AdapterVersion:
    return publish(lora_alpha=6, use_rslora=True)


@pytest.fixture
def folder(store: AdapterStore, version: AdapterVersion) -> Path:
    return store.weights_of(version.digest).parent


@pytest.fixture
def from_upload(store: AdapterStore, version: AdapterVersion, base: BaseDescription, folder: Path) -> PackedAdapter:
    """What a load gives that finds no packed form; leaves one behind."""
    drop(folder)
    return store.load_packed(version.digest, base)


def drop(folder: Path) -> None:
    for path in folder.glob("packed-*"):
        path.unlink()


def same(one: PackedAdapter, other: PackedAdapter) -> bool:
    alike = (one.digest, one.modules, one.buffer.dtype) == (other.digest, other.modules, other.buffer.dtype)
    return alike and torch.equal(one.buffer, other.buffer)


def test_a_load_may_write_the_packed_form_later(
    store: AdapterStore, version: AdapterVersion, base: BaseDescription, folder: Path
) -> None:
    drop(folder)
    later: list[Callable[[Pace], None]] = []
    loaded = store.load_packed(version.digest, base, later=later.append)
    assert list(folder.glob("packed-*")) == []
    [write] = later
    write(TimeSlices())
    assert len(list(folder.glob("packed-*"))) == 2
    assert same(store.load_packed(version.digest, base, later=later.append), loaded)
    assert later == [write], "it was read from the packed form"


def test_a_publish_leaves_the_packed_form_and_a_load_reads_only_it(
    store: AdapterStore, version: AdapterVersion, base: BaseDescription, folder: Path
) -> None:
    at_publish = store.load_packed(version.digest, base)
    drop(folder)
    from_upload = store.load_packed(version.digest, base)
    store.weights_of(version.digest).unlink()
    assert same(at_publish, from_upload)
    assert same(store.load_packed(version.digest, base), from_upload)


@pytest.mark.parametrize("suffix", [".bin", ".json"])
@pytest.mark.parametrize("where", [0, 0.3, 0.7, 1])
def test_a_changed_byte_anywhere_is_noticed_and_made_good(
    suffix: str,
    where: float,
    store: AdapterStore,
    version: AdapterVersion,
    base: BaseDescription,
    folder: Path,
    from_upload: PackedAdapter,
) -> None:
    [path] = folder.glob(f"packed-*{suffix}")
    sound = path.read_bytes()
    data = bytearray(sound)
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    assert read_packed(folder, version.digest, base, buffers=HostBuffers(), slices=TimeSlices()) is None
    assert same(store.load_packed(version.digest, base), from_upload)
    assert path.read_bytes() == sound


@pytest.mark.parametrize("suffix", [".bin", ".json"])
@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"\n")])
def test_a_lost_or_cut_file_is_noticed_and_made_good(
    suffix: str,
    damage: Callable[[Path], object],
    store: AdapterStore,
    version: AdapterVersion,
    base: BaseDescription,
    folder: Path,
    from_upload: PackedAdapter,
) -> None:
    [path] = folder.glob(f"packed-*{suffix}")
    damage(path)
    assert same(store.load_packed(version.digest, base), from_upload)
    assert same(read(folder, version, base), from_upload)


def read(folder: Path, version: AdapterVersion, base: BaseDescription) -> PackedAdapter:
    packed = read_packed(folder, version.digest, base, buffers=HostBuffers(), slices=TimeSlices())
    assert packed is not None
    return packed


@pytest.mark.parametrize(
    "other", [tiny_base(dtype="bfloat16"), tiny_base(digest="sha256:" + "c" * 64), replace(tiny_base(), groups=())]
)
def test_the_packed_form_of_another_layout_is_not_taken(
    other: BaseDescription, version: AdapterVersion, folder: Path
) -> None:
    assert read_packed(folder, version.digest, other, buffers=HostBuffers(), slices=TimeSlices()) is None


def test_each_layout_keeps_its_own(
    store: AdapterStore, version: AdapterVersion, base: BaseDescription, folder: Path
) -> None:
    half = tiny_base(dtype="bfloat16")
    assert store.load_packed(version.digest, half).buffer.dtype is torch.bfloat16
    assert read(folder, version, half).buffer.dtype is torch.bfloat16
    assert read(folder, version, base).buffer.dtype is torch.float32


def aged(path: Path, age_s: float) -> Path:
    then_s = time.time() - age_s
    os.utime(path, (then_s, then_s))
    return path


def test_a_sweep_takes_half_written_forms_without_a_writer(
    store: AdapterStore, base: BaseDescription, folder: Path, from_upload: PackedAdapter
) -> None:
    store.remember_base(base)
    whole = sorted(folder.iterdir())
    hour_s = 3600.0
    left, written = (folder / f".packed-{base.layout_key}.bin.{name * 32}" for name in "ab")
    left.write_bytes(b"half")
    with written.open("wb") as stream:
        aged(left, hour_s + 60)
        aged(written, hour_s + 60)
        stream.write(b"half")
        stream.flush()  # a live process writes
        assert store.sweep(hour_s).num_packed == 1
    assert sorted(folder.iterdir()) == sorted([*whole, written])


def test_a_sweep_takes_forms_of_other_layouts_that_no_load_uses(
    store: AdapterStore, version: AdapterVersion, base: BaseDescription, folder: Path, from_upload: PackedAdapter
) -> None:
    half, old = tiny_base(dtype="bfloat16"), tiny_base(dtype="float16")
    store.remember_base(base)
    for each in (half, old):
        store.load_packed(version.digest, each)
    for path in folder.glob("packed-*"):
        aged(path, UNUSED_S + 60)
    read(folder, version, half)  # another server's base
    assert store.sweep().num_packed == 2
    assert {path.stem for path in folder.glob("packed-*")} == {f"packed-{each.layout_key}" for each in (base, half)}
    assert same(read(folder, version, base), from_upload)
    assert store.sweep().num_packed == 0


def test_another_adapters_packed_form_in_the_place_of_this_one_is_noticed(
    store: AdapterStore, version: AdapterVersion, base: BaseDescription, publish: Publish, folder: Path
) -> None:
    other = publish("other", seed=1)
    for path in store.weights_of(other.digest).parent.glob("packed-*"):
        path.replace(folder / path.name)
    assert read_packed(folder, version.digest, base, buffers=HostBuffers(), slices=TimeSlices()) is None
    assert store.load_packed(version.digest, base).digest == version.digest


def test_a_blob_deleted_meanwhile_is_not_brought_back(
    store: AdapterStore, version: AdapterVersion, base: BaseDescription, folder: Path
) -> None:
    packed = store.load_packed(version.digest, base)
    store.delete("acme", "law")
    keep_packed(folder, packed, base, TimeSlices())
    assert not folder.exists()
