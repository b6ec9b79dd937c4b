"""What an import brings to this disk: only what fits beside the reserve."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters_store.errors import StoreError
from adapters_store.remote.imports import ImportLimits, fetch_import
from adapters_store.store import AdapterStore
from support.servers.object_store import ObjectStore

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 5000}


@pytest.fixture
def sources(tmp_path: Path, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same files in a folder and in a bucket."""
    for name, value in objects.environment.items():
        monkeypatch.setenv(name, value)
    folder, place = tmp_path / "law", objects.bucket("imports")
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
        objects.write(place, name, data)
    return [str(folder), place]


def test_an_import_without_room_is_refused_before_a_byte_of_it_is_written(tmp_path: Path, sources: list[str]) -> None:
    limits = ImportLimits(None, 1 << 20, 1 << 20)
    for number, (source, reserve_bytes) in enumerate((each, size) for each in sources for size in (0, 1 << 60)):
        store, target = AdapterStore.open(tmp_path / "data", reserve_bytes=reserve_bytes), tmp_path / str(number)
        if reserve_bytes == 0:
            assert fetch_import(source, target, limits, store.require_room) == b"{}"
            assert target.read_bytes() == FILES["adapter_model.safetensors"]
        else:
            with pytest.raises(StoreError, match="no room for 5000 bytes"):
                fetch_import(source, target, limits, store.require_room)
            assert not target.exists() or target.stat().st_size == 0
        store.close()
