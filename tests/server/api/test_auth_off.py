"""`auth="off"`: the header says who asks; keys are ignored, but admin routes still want one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from server.api.settings import ApiSettings

ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 1, "temperature": 0}


@pytest.fixture(scope="module")
def settings(data_dir: Path) -> ApiSettings:
    return ApiSettings(data_dir=data_dir, auth="off", admin_keys=("admin-key-for-tests",))


@pytest.mark.parametrize("key", [None, "EMPTY", "anything at all"])
def test_nobody_needs_a_key(connect: Callable[..., httpx.Client], key: str | None) -> None:
    assert connect(key).post("/v1/completions", json=ASK).status_code == 200


def test_a_tenant_exists_with_its_first_adapter(
    connect: Callable[..., httpx.Client], upload: Callable[..., httpx.Response]
) -> None:
    initech = connect(None, **{"X-Tenant-Id": "initech"})
    assert upload(initech, "tps").status_code == 201
    assert upload(initech, "tps", seed=1).json()["version"] == 2
    assert initech.post("/v1/completions", json={**ASK, "model": "tps"}).status_code == 200


def test_without_a_header_every_tenants_adapters_can_be_named(
    connect: Callable[..., httpx.Client], upload: Callable[..., httpx.Response]
) -> None:
    anyone, hooli = connect(None), connect(None, **{"X-Tenant-Id": "hooli"})
    assert upload(hooli, "nucleus").status_code == 201
    assert upload(anyone, "own").json()["tenant"] == "default"
    listed = {model["id"] for model in anyone.get("/v1/models").json()["data"]}
    assert {"tiny", "own", "hooli/nucleus"} <= listed
    for model in listed:
        assert anyone.post("/v1/completions", json={**ASK, "model": model}).status_code == 200


def test_a_header_narrows_to_its_tenant(
    connect: Callable[..., httpx.Client], upload: Callable[..., httpx.Response]
) -> None:
    pied, gavin = (connect(None, **{"X-Tenant-Id": name}) for name in ("pied", "gavin"))
    assert upload(pied, "piper").status_code == 201
    for model in ("piper", "pied/piper"):
        assert gavin.post("/v1/completions", json={**ASK, "model": model}).status_code == 404
    assert [model["id"] for model in gavin.get("/v1/models").json()["data"]] == ["tiny"]


def test_admin_routes_still_want_an_admin_key(connect: Callable[..., httpx.Client]) -> None:
    assert connect(None).get("/admin/tenants").status_code == 403
    assert connect("wrong").post("/admin/tenants", json={"name": "x"}).status_code == 403
    assert connect("admin-key-for-tests").get("/admin/tenants").status_code == 200
