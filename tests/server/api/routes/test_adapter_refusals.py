"""POST /v1/adapters: everything an upload is refused for, and that nothing of it is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest

from adapters_store.base.description import BaseDescription
from adapters_store.store import AdapterStore
from server.api.engine_client import EngineClient
from server.api.settings import ApiSettings
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes
from support.servers.raw_http import dial, head, read_response
from support.servers.waiting import wait_until

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


def test_the_bases_name_is_taken(client: httpx.Client, upload: Upload) -> None:
    response = upload(client, "tiny")
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "name_is_base"


def test_what_the_store_refuses_is_a_400_with_its_code(client: httpx.Client, upload: Upload) -> None:
    response = upload(client, "dora", use_dora=True)  # its weights hold no magnitudes
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "missing_magnitude"
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
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
        "GGUF": b"GGUF\3\0\0\0" * 9,
        "huge header": (2**40).to_bytes(8, "little") + b"{}",
    }


def test_hostile_weights_get_a_400_and_a_code_at_once_and_nothing_is_logged(
    client: httpx.Client, engine: EngineClient, store: AdapterStore, caplog: pytest.LogCaptureFixture
) -> None:
    codes = {}
    for kind, weights in hostile_weights(engine.base).items():
        start_s = time.process_time()
        files = {"name": b"hostile", "config": config_bytes(), "weights": weights}
        response = client.post("/v1/adapters", files=files)
        assert time.process_time() - start_s < 1.0, kind  # 0.1 on a machine of its own
        assert response.status_code == 400, kind
        codes[kind] = response.json()["error"]["code"]
    assert all(codes.values())
    assert len(set(codes.values())) >= 5, codes
    assert store.versions("acme", "hostile") == []
    assert [record for record in caplog.records if record.name != "server.api.access"] == []


def test_one_of_several_shards_is_refused_by_its_filename_and_a_whole_file_is_not(
    client: httpx.Client, weights: bytes
) -> None:
    """One shard alone is a sound file: it would be served without the layers of the others."""

    def send(filename: str) -> httpx.Response:
        parts = {"name": (None, b"sharded"), "config": config_bytes(), "weights": (filename, weights)}
        return client.post("/v1/adapters", files=parts)

    refused = send("adapter_model-00001-of-00002.safetensors")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "sharded_weights")
    assert "save_file" in refused.json()["error"]["message"]
    assert send("adapter_model-00001-of-00001.safetensors").status_code == 201
    assert send("adapter_model.safetensors").status_code == 201


@pytest.mark.parametrize(
    "config", [b"version https://git-lfs.github.com/spec/v1\n", b'{"lora_parameters": {"rank": 8}}']
)
def test_a_config_that_is_something_else_is_called_so(client: httpx.Client, weights: bytes, config: bytes) -> None:
    response = client.post("/v1/adapters", files={"name": b"x", "config": config, "weights": weights})
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("git_lfs_pointer", "unsupported_format")


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
    assert "duplicate part" in response.json()["error"]["message"]


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
    [
        ("application/xml", 415),
        ("text/plain", 415),
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=" + "x" * 71, 400),
    ],
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
