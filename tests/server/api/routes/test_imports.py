"""An operator imports adapters by place: only allowed places are read, and what they hold is checked as an upload."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.settings import ApiSettings
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base
from support.servers import object_store

from ..conftest import ADMIN_KEY, MakeClient

PLACE = "s3://models/store"


@pytest.fixture(scope="module")
def objects() -> Iterator[object_store.ObjectStore]:
    with object_store.in_environment("models") as store:
        yield store


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def settings(data_dir: Path, hub: Path) -> ApiSettings:
    prefixes = (f"{PLACE}/1", str(hub))
    return ApiSettings(data_dir=data_dir, admin_keys=(ADMIN_KEY,), import_prefixes=prefixes, max_adapter_bytes=1 << 20)


@pytest.fixture(scope="module")
def operator(connect: MakeClient, keys: dict[str, str]) -> httpx.Client:
    assert "acme" in keys
    return connect(ADMIN_KEY, **{"X-Tenant-Id": "acme"})


def put(objects: object_store.ObjectStore, place: str, **changes: Any) -> str:
    weights = safetensors_bytes(lora_tensors(tiny_base(), seed=3))
    objects.write(PLACE, f"{place}/adapter_config.json", config_bytes(**changes))
    objects.write(PLACE, f"{place}/adapter_model.safetensors", weights)
    return f"{PLACE}/{place}"


def bring(client: httpx.Client, name: str, source: str) -> httpx.Response:
    return client.post("/v1/adapters", json={"name": name, "source": source})


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_an_operator_imports_from_a_bucket_and_from_a_hub_cache(
    objects: object_store.ObjectStore, operator: httpx.Client, client: httpx.Client, hub: Path, upload: Any
) -> None:
    uploaded = upload(client, "uploaded", seed=3).json()
    made = bring(operator, "from-bucket", put(objects, "1/law"))
    assert (made.status_code, made.json()["digest"]) == (201, uploaded["digest"])
    snapshot, blobs = hub / "models--x" / "snapshots" / "abc", hub / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, data in (
        ("adapter_config.json", config_bytes()),
        ("adapter_model.safetensors", safetensors_bytes(lora_tensors(tiny_base(), seed=3))),
    ):
        (blobs / name).write_bytes(data)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
    assert bring(operator, "from-hub", str(snapshot)).json()["digest"] == uploaded["digest"]
    asked = client.post("/v1/completions", json={"model": "from-bucket", "prompt": "Hi", "max_tokens": 2})
    assert asked.status_code == 200


def test_what_is_imported_is_checked_as_an_upload(
    objects: object_store.ObjectStore, operator: httpx.Client, client: httpx.Client, upload: Any
) -> None:
    refused = upload(client, "bad", seed=3, r=0)
    assert code_of(bring(operator, "bad", put(objects, "1/bad", r=0))) == code_of(refused)
    objects.write(PLACE, "1/large/adapter_config.json", config_bytes())
    objects.write(PLACE, "1/large/adapter_model.safetensors", b"0" * ((1 << 20) + 1))
    assert code_of(bring(operator, "large", f"{PLACE}/1/large")) == (413, "too_large")
    assert code_of(bring(operator, "none", f"{PLACE}/1/none")) == (400, "source_not_found")
    assert client.get("/v1/adapters/bad").status_code == 404


def test_only_allowed_places_are_read_and_only_for_operators(
    objects: object_store.ObjectStore, operator: httpx.Client, client: httpx.Client, hub: Path, tmp_path: Path
) -> None:
    put(objects, "10/law")
    (hub / "out").symlink_to(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(config_bytes())
    places = [
        f"{PLACE}/10/law",
        f"{PLACE}/1/../10/law",
        f"{PLACE}/1/%2e%2e/10/law",
        f"{PLACE}//1/law",
        "s3://models@elsewhere/store/1/law",
        "http://169.254.169.254/latest",
        "file:///etc",
        "/etc",
        f"{hub}/1\0",
        f"{hub}/../{tmp_path.name}",
        str(hub / "out"),
    ]
    assert {place: code_of(bring(operator, "x", place)) for place in places} == dict.fromkeys(
        places, (400, "source_not_allowed")
    )
    assert code_of(bring(client, "x", f"{PLACE}/1/law")) == (403, "admin_key_required")


def test_a_body_that_names_no_place_is_not_kept_up_to_the_limit_of_an_upload(app: FastAPI) -> None:
    num_sent = 0

    async def blanks() -> AsyncIterator[bytes]:
        nonlocal num_sent
        for _ in range(1000):
            num_sent += 1
            yield b" " * 65_536

    async def post() -> httpx.Response:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/json", "X-Tenant-Id": "acme"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            return await client.post("/v1/adapters", content=blanks(), headers=headers)

    assert code_of(asyncio.run(post())) == (413, "too_large")
    assert num_sent * 65_536 <= (1 << 20) + 65_536
