"""The server's disk is full: uploads are refused with a code, answers go on, and uploads too once there is room."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from adapters_store.storage.blobs import RESERVE_BYTES
from support.stores.disks import fill_up, small_disk

ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 2}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_disk(tmp_path_factory.mktemp("full") / "disk", mib=80) as disk:
        yield disk / "data"


def test_a_full_disk_is_a_503_with_a_code_and_answers_go_on(
    data_dir: Path, client: httpx.Client, upload: Callable[..., httpx.Response]
) -> None:
    assert upload(client, "before", seed=1).status_code == 201
    filler = data_dir.parent / "filler"
    fill_up(filler)
    response = upload(client, "during", seed=2)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "disk_full")
    assert response.headers["x-should-retry"] == "false"
    assert list((data_dir / "uploads").iterdir()) == []
    for model in ("tiny", "before"):
        assert client.post("/v1/completions", json={**ASK, "model": model}).status_code == 200
    assert [each["name"] for each in client.get("/v1/adapters").json()["data"]] == ["before"]
    filler.unlink()
    assert upload(client, "after", seed=3).status_code == 201


def test_a_file_whose_copy_would_take_what_must_stay_free_is_refused(data_dir: Path, client: httpx.Client) -> None:
    """What is kept is a copy of what came, so both must fit beside the database's reserve."""
    disk = os.statvfs(data_dir)
    num_bytes = (disk.f_bavail * disk.f_frsize - RESERVE_BYTES) * 2 // 3
    assert num_bytes > 1 << 20
    files = {"purpose": (None, b"fine-tune"), "file": ("data.jsonl", b"x" * num_bytes)}
    response = client.post("/v1/files", files=files)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "disk_full")
    assert client.get("/v1/files").json()["data"] == []
    disk = os.statvfs(data_dir)
    assert disk.f_bavail * disk.f_frsize >= RESERVE_BYTES
