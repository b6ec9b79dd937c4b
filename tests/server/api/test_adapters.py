"""/v1/adapters over the socket: upload, use, list, delete, and everything an upload is refused for."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest

from adapters_store.base import BaseDescription
from adapters_store.store import AdapterStore
from server.api.ports import EngineClient
from server.api.settings import ApiSettings
from support.adapter_files import config_bytes, lora_tensors, safetensors_bytes
from support.raw_http import dial, head, read_response
from support.waiting import wait_until

Upload = Callable[..., httpx.Response]

MAX_WEIGHTS = 200_000


@pytest.fixture(scope="module")
def settings(data_dir: Path) -> ApiSettings:
    return ApiSettings(
        data_dir=data_dir,
        admin_keys=("admin-key-for-tests",),
        max_adapter_bytes=MAX_WEIGHTS,
        max_config_bytes=20_000,
        max_uploads=8,
    )


@pytest.fixture(scope="module")
def weights(engine: EngineClient) -> bytes:
    return safetensors_bytes(lora_tensors(engine.base))


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


def test_the_bases_name_is_taken(client: httpx.Client, upload: Upload) -> None:
    response = upload(client, "tiny")
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "name_is_base"


def test_what_the_store_refuses_is_a_400_with_its_code(client: httpx.Client, upload: Upload) -> None:
    response = upload(client, "dora", use_dora=True)
    assert response.status_code == 400
    error = response.json()["error"]
    assert "dora" in error["code"]
    assert client.get("/v1/adapters/dora").status_code == 404


def hostile_weights(base: BaseDescription) -> dict[str, bytes]:
    good = lora_tensors(base)
    first = next(iter(good))
    with_nan = good | {first: good[first] * np.float32("nan")}
    wrong_shape = good | {first: good[first][:, :-1].copy()}
    return {
        "empty": b"",
        "truncated": safetensors_bytes(good)[:-1],
        "nan": safetensors_bytes(with_nan),
        "wrong shape": safetensors_bytes(wrong_shape),
        "no such module": safetensors_bytes({"base_model.model.nothing.lora_A.weight": good[first]}),
        "pickle": b"\x80\x04\x95 not safetensors at all",
        "huge header": (2**40).to_bytes(8, "little") + b"{}",
    }


def test_hostile_weights_get_a_400_and_a_code_at_once_and_nothing_is_logged(
    client: httpx.Client, engine: EngineClient, store: AdapterStore, caplog: pytest.LogCaptureFixture
) -> None:
    codes = {}
    for kind, weights in hostile_weights(engine.base).items():
        start_s = time.perf_counter()
        files = {"name": b"hostile", "config": config_bytes(), "weights": weights}
        response = client.post("/v1/adapters", files=files)
        assert time.perf_counter() - start_s < 0.5, kind  # 0.1 on a machine of its own
        assert response.status_code == 400, kind
        codes[kind] = response.json()["error"]["code"]
    assert all(codes.values())
    assert len(set(codes.values())) >= 5, codes
    assert store.versions("acme", "hostile") == []
    assert caplog.records == []


@pytest.mark.parametrize("name", ["../x", "a/b", "a@1", "x" * 129, " ", "\N{SNOWMAN}"])
def test_a_bad_name_is_a_400(client: httpx.Client, upload: Upload, name: str) -> None:
    response = upload(client, name)
    assert response.status_code == 400
    assert (response.json()["error"]["code"], response.json()["error"]["param"]) == ("bad_name", "name")


@pytest.mark.parametrize("missing", ["name", "config", "weights"])
def test_a_missing_part_is_named(client: httpx.Client, weights: bytes, missing: str) -> None:
    parts = {"name": b"x", "config": config_bytes(), "weights": weights}
    del parts[missing]
    response = client.post("/v1/adapters", files=parts)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (missing, "missing_required_parameter")


def test_an_unknown_part_is_named(client: httpx.Client, weights: bytes) -> None:
    parts = {"name": b"x", "config": config_bytes(), "weights": weights, "colour": b"red"}
    response = client.post("/v1/adapters", files=parts)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("colour", "unknown_parameter")


def test_a_part_given_twice_is_refused(client: httpx.Client, weights: bytes) -> None:
    parts = [("name", b"x"), ("name", b"y"), ("config", config_bytes()), ("weights", weights)]
    response = client.post("/v1/adapters", files=parts)
    assert response.status_code == 400
    assert "twice" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("part", "size", "limit"),
    [("weights", MAX_WEIGHTS + 1, MAX_WEIGHTS), ("config", 20_001, 20_000), ("name", 513, 512)],
)
def test_a_part_too_large_is_a_413_with_the_limit(
    client: httpx.Client, weights: bytes, part: str, size: int, limit: int
) -> None:
    parts = {"name": b"x", "config": config_bytes(), "weights": weights, part: b"x" * size}
    response = client.post("/v1/adapters", files=parts)
    assert response.status_code == 413
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("too_large", part)
    assert str(limit) in error["message"]


def test_a_body_too_large_is_refused_from_its_length_alone(url: str, keys: dict[str, str]) -> None:
    form = {"Content_Type": "multipart/form-data; boundary=x", "Content_Length": str(10**9)}
    with dial(url) as connection:
        connection.sendall(head("POST", "/v1/adapters", key=keys["acme"], **form))
        response = read_response(connection)
    assert response.status == 413
    assert response.error["code"] == "too_large"


def test_a_form_cut_short_is_refused(client: httpx.Client) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nlaw'
    response = client.post("/v1/adapters", headers={"content-type": "multipart/form-data; boundary=x"}, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_multipart"


@pytest.mark.parametrize(
    ("content_type", "status"),
    [("application/json", 415), ("multipart/form-data", 400), ("multipart/form-data; boundary=" + "x" * 71, 400)],
)
def test_a_body_that_is_no_form_is_refused(client: httpx.Client, content_type: str, status: int) -> None:
    response = client.post("/v1/adapters", headers={"content-type": content_type}, content=b"{}")
    assert response.status_code == status


def test_an_upload_without_a_key_is_refused_before_its_body(url: str) -> None:
    form = {"Content_Type": "multipart/form-data; boundary=x", "Content_Length": "1000"}
    with dial(url) as connection:
        connection.sendall(head("POST", "/v1/adapters", **form))
        assert read_response(connection).status == 401


def test_an_upload_broken_off_leaves_nothing(url: str, keys: dict[str, str], data_dir: Path) -> None:
    form = {"Content_Type": "multipart/form-data; boundary=x", "Content_Length": "1000"}
    part = b'--x\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n123'
    with dial(url) as connection:
        connection.sendall(head("POST", "/v1/adapters", key=keys["acme"], **form) + part)
        wait_until(lambda: any((data_dir / "uploads").iterdir()))
    wait_until(lambda: not any((data_dir / "uploads").iterdir()))


def test_uploads_beyond_the_limit_are_told_to_come_again(
    client: httpx.Client, upload: Upload, url: str, keys: dict[str, str], data_dir: Path
) -> None:
    form = {"Content_Type": "multipart/form-data; boundary=x", "Content_Length": "1000"}
    with ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(dial(url))
            connection.sendall(head("POST", "/v1/adapters", key=keys["acme"], **form) + b"--x")
        wait_until(lambda: len(list((data_dir / "uploads").iterdir())) == 8)
        response = upload(client, "ninth")
        assert (response.status_code, response.headers["retry-after"]) == (429, "2")
        assert response.json()["error"]["code"] == "too_many_uploads"
    wait_until(lambda: not any((data_dir / "uploads").iterdir()))
    assert upload(client, "ninth").status_code == 201


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
        assert gate.wait(10)
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
