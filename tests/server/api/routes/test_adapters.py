"""/v1/adapters over the socket: upload, use, list, delete."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store.store import AdapterStore
from support.worlds.fake_engine import FakeEngine

Upload = Callable[..., httpx.Response]


@pytest.fixture(autouse=True)
def no_spool_is_left(data_dir: Path) -> Iterator[None]:
    yield
    assert list((data_dir / "uploads").glob("*")) == []


def test_upload_answers_201_with_what_was_understood(client: httpx.Client, upload: Upload) -> None:
    response = upload(client, "law", seed=1)
    assert response.status_code == 201, response.text
    body = response.json()
    assert body["digest"].startswith("sha256:")
    assert body["created"] <= time.time()
    assert {field: body[field] for field in ("id", "object", "tenant", "name", "version", "active", "rank")} == {
        "id": "law@1",
        "object": "adapter",
        "tenant": "acme",
        "name": "law",
        "version": 1,
        "active": True,
        "rank": 4,
    }
    assert body["target_modules"] == ["q_proj", "v_proj"]
    assert body["bytes"] > 0


def test_an_uploaded_adapter_answers_at_once(client: httpx.Client, upload: Upload) -> None:
    upload(client, "instant", seed=2)
    ask = {"model": "instant", "prompt": "hello", "max_tokens": 20, "temperature": 0}
    response = client.post("/v1/completions", json=ask)
    assert response.status_code == 200
    base = client.post("/v1/completions", json={**ask, "model": "tiny"})
    assert response.json()["choices"][0]["text"] != base.json()["choices"][0]["text"]


def test_an_int8_adapter_takes_less_room_is_measured_and_answers(client: httpx.Client, upload: Upload) -> None:
    int8 = {"adapter_dtype": "int8"}
    plain, small = upload(client, "plain", seed=3), upload(client, "small", seed=3, fields=int8)
    assert small.status_code == 201, small.text
    assert small.json()["digest"] != plain.json()["digest"]
    assert small.json()["bytes"] < plain.json()["bytes"]
    listed = {each["name"]: each["adapter_dtype"] for each in client.get("/v1/adapters?limit=100").json()["data"]}
    assert (listed["plain"], listed["small"]) == (None, "int8")
    assert client.get("/v1/adapters/small").json()["versions"][-1]["adapter_dtype"] == "int8"
    ask = {"model": "small", "prompt": "hello", "max_tokens": 2, "temperature": 0}
    assert client.post("/v1/completions", json=ask).status_code == 200
    again = upload(client, "small", seed=3, multilora_adapter_dtype="int8")
    assert again.json() == small.json(), "the config says the same"


def test_int8_that_changes_too_much_is_refused_and_not_stored(
    client: httpx.Client, upload: Upload, fake_engine: FakeEngine
) -> None:
    fake_engine.nats = 0.02
    as_part: dict[str, Any] = {"fields": {"adapter_dtype": "int8"}}
    try:
        for how in (as_part, {"multilora_adapter_dtype": "int8"}):
            error = upload(client, "coarse", seed=4, **how).json()["error"]
            assert (error["code"], error["param"]) == ("int8_changes_too_much", "adapter_dtype")
            assert "0.02 nats, the limit is 0.01" in error["message"]
    finally:
        fake_engine.nats = 0.0
    plain, small = fake_engine.measured[-1]
    assert (plain.is_int8, small.is_int8) == (False, True)
    assert client.get("/v1/adapters/coarse").status_code == 404
    refused = upload(client, "coarse", fields={"adapter_dtype": "int4"}).json()["error"]
    assert (refused["code"], refused["message"]) == (
        "unknown_adapter_dtype",
        "adapter_dtype: must be int8 or absent, got 'int4'",
    )


def test_the_same_name_again_is_the_next_version(client: httpx.Client, upload: Upload) -> None:
    versions = [upload(client, "again", seed=seed).json() for seed in (1, 2, 1)]
    assert [body["version"] for body in versions] == [1, 2, 1]
    shown = client.get("/v1/adapters/again").json()
    assert [version["id"] for version in shown["versions"]] == ["again@1", "again@2"]
    assert (shown["version"], shown["active"]) == (1, True)
    assert client.get("/v1/adapters/again@2").json()["digest"] == versions[1]["digest"]


def test_list_shows_the_callers_own(client: httpx.Client, other: httpx.Client, upload: Upload) -> None:
    upload(client, "mine")
    upload(other, "theirs")
    ids = [adapter["id"] for adapter in client.get("/v1/adapters").json()["data"]]
    assert "mine@1" in ids
    assert all("theirs" not in one for one in ids)


def test_list_comes_in_pages(client: httpx.Client, upload: Upload) -> None:
    for index in range(3):
        upload(client, f"paged-{index}")
    every = [adapter["id"] for adapter in client.get("/v1/adapters").json()["data"]]
    first = client.get("/v1/adapters", params={"limit": 2}).json()
    rest = client.get("/v1/adapters", params={"after": first["last_id"]}).json()
    assert [adapter["id"] for adapter in first["data"] + rest["data"]] == every
    assert (first["has_more"], rest["has_more"]) == (True, False)


def test_an_admin_lists_every_tenants_by_names_it_can_use(
    admin: httpx.Client, client: httpx.Client, upload: Upload
) -> None:
    upload(client, "known")
    ids = [adapter["id"] for adapter in admin.get("/v1/adapters", params={"limit": 1000}).json()["data"]]
    assert "acme/known@1" in ids
    assert admin.get("/v1/adapters/acme/known@1").status_code == 200


def test_a_deleted_version_is_gone_and_the_others_stay(client: httpx.Client, upload: Upload) -> None:
    digests = [upload(client, "partly", seed=seed).json()["digest"] for seed in (11, 12)]
    deleted = client.delete("/v1/adapters/partly@1")
    assert deleted.json() == {"id": "partly@1", "object": "adapter.deleted", "deleted": True, "digests": digests[:1]}
    ask = {"prompt": "x", "max_tokens": 1}
    assert client.post("/v1/completions", json={**ask, "model": "partly@1"}).status_code == 404
    assert client.post("/v1/completions", json={**ask, "model": "partly"}).status_code == 200


def test_without_its_active_version_a_name_is_shown_but_means_nothing(client: httpx.Client, upload: Upload) -> None:
    for seed in (21, 22):
        upload(client, "headless", seed=seed)
    client.delete("/v1/adapters/headless@2")
    assert client.post("/v1/completions", json={"model": "headless", "prompt": "x"}).status_code == 404
    shown = client.get("/v1/adapters/headless").json()
    assert (shown["id"], shown["active"]) == ("headless@1", False)


@pytest.mark.parametrize("name", ["nothing", "nothing@1", "acme/nothing", "globex/law", "a/b/c", "law@99", "law@x"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_unknown_adapter_is_a_404(client: httpx.Client, method: str, name: str) -> None:
    response = client.request(method, f"/v1/adapters/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_another_tenants_adapter_cannot_be_deleted(client: httpx.Client, other: httpx.Client, upload: Upload) -> None:
    upload(client, "kept")
    for name in ("kept", "acme/kept"):
        assert other.delete(f"/v1/adapters/{name}").status_code == 404
    assert client.get("/v1/adapters/kept").status_code == 200


def test_what_a_killed_server_left_goes_with_the_next_upload(
    client: httpx.Client, upload: Upload, data_dir: Path
) -> None:
    old, recent = data_dir / "uploads" / "old.part", data_dir / "uploads" / "recent.part"
    for path in (old, recent):
        path.write_bytes(b"x")
    two_hours_ago_s = time.time() - 7200
    os.utime(old, (two_hours_ago_s, two_hours_ago_s))
    upload(client, "sweeper")
    assert (old.exists(), recent.exists()) == (False, True)
    recent.unlink()


def test_an_upload_that_waits_for_its_checks_delays_nobody(
    client: httpx.Client, upload: Upload, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, publish = threading.Event(), store.publish

    def slow_publish(**arguments: object) -> object:
        assert gate.wait(300)
        return publish(**arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "publish", slow_publish)
    uploading = [threading.Thread(target=upload, args=(client, f"slow-{index}")) for index in range(4)]
    for thread in uploading:
        thread.start()
    ask = {"model": "tiny", "prompt": "hello", "max_tokens": 5}
    assert client.post("/v1/completions", json=ask).status_code == 200
    assert client.get("/v1/models").status_code == 200
    gate.set()
    for thread in uploading:
        thread.join()
    assert client.get("/v1/adapters/slow-3").status_code == 200
