"""/admin/tenants/NAME/keys and /admin/audit: keys come, are listed, rotate and go, and who did it is written down."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

Connect = Callable[..., httpx.Client]


@pytest.fixture(scope="module")
def tenant(admin: httpx.Client) -> str:
    assert admin.post("/admin/tenants", json={"name": "keyed"}).status_code == 201
    return "/admin/tenants/keyed"


def test_a_key_with_a_scope_is_shown_once_and_opens_that_much(
    admin: httpx.Client, connect: Connect, tenant: str
) -> None:
    response = admin.post(f"{tenant}/keys", json={"scopes": ["read"], "label": "dashboard"})
    assert response.status_code == 201
    made = response.json()
    assert (made["object"], made["tenant"], made["scopes"], made["label"]) == ("key", "keyed", ["read"], "dashboard")
    own = connect(made["api_key"])
    assert own.get("/v1/models").status_code == 200
    refused = own.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert refused.status_code == 403
    assert refused.json()["error"]["type"] == "permission_error"
    assert "inference" in refused.json()["error"]["message"]
    listed = admin.get(f"{tenant}/keys").json()["data"]
    assert {key["label"]: key["scopes"] for key in listed}["dashboard"] == ["read"]
    assert not any("api_key" in key for key in listed)


def test_a_rotated_key_opens_until_its_overlap_ends(admin: httpx.Client, connect: Connect, tenant: str) -> None:
    old = admin.post(f"{tenant}/keys", json={"scopes": ["read"]}).json()
    new = admin.post(f"{tenant}/rotate-key", params={"key_id": old["id"], "overlap_s": 2}).json()
    assert new["scopes"] == ["read"]
    assert connect(old["api_key"]).get("/v1/models").status_code == 200
    assert connect(new["api_key"]).get("/v1/models").status_code == 200
    deadline_s = time.monotonic() + 20
    while connect(old["api_key"]).get("/v1/models").status_code != 401:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert connect(new["api_key"]).get("/v1/models").status_code == 200


def test_a_revoked_key_is_a_401_at_once(admin: httpx.Client, connect: Connect, tenant: str) -> None:
    made = admin.post(f"{tenant}/keys", json={}).json()
    assert connect(made["api_key"]).get("/v1/models").status_code == 200
    assert admin.delete(f"{tenant}/keys/{made['id']}").json()["deleted"] is True
    assert connect(made["api_key"]).get("/v1/models").status_code == 401
    assert admin.delete("/admin/tenants/acme/keys/999999").status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"scopes": ["root"]}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"expires_at": 12}, "expires_at"),
        ({"expires_at": -1}, "expires_at"),
        ({"label": "x" * 129}, "label"),
        ({"admin": True}, "admin"),
    ],
)
def test_a_bad_wish_is_a_400_that_names_the_field(
    admin: httpx.Client, tenant: str, body: dict[str, Any], param: str
) -> None:
    response = admin.post(f"{tenant}/keys", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("query", ["overlap_s=-1", "overlap_s=x", "overlap_s=99999999", "key_id=0"])
def test_a_bad_rotation_is_a_400(admin: httpx.Client, tenant: str, query: str) -> None:
    assert admin.post(f"{tenant}/rotate-key?{query}").status_code == 400


def test_a_disabled_tenants_keys_open_again_once_it_is_enabled(admin: httpx.Client, connect: Connect) -> None:
    key = admin.post("/admin/tenants", json={"name": "paused"}).json()["api_key"]
    assert admin.post("/admin/tenants/paused/disable").json()["disabled"] is True
    assert connect(key).get("/v1/models").status_code == 401
    assert admin.post("/admin/tenants/paused/enable").json()["disabled"] is False
    assert connect(key).get("/v1/models").status_code == 200


def test_the_audit_log_says_who_did_what_by_which_request(
    admin: httpx.Client, connect: Connect, upload: Callable[..., httpx.Response]
) -> None:
    key = admin.post("/admin/tenants", json={"name": "watched"}, headers={"x-request-id": "req-make"}).json()["api_key"]
    own = connect(key)
    digest = upload(own, "law", seed=5).json()["digest"]
    own.delete("/v1/adapters/law", headers={"x-request-id": "req-drop"})
    answer = admin.get("/admin/audit", params={"tenant": "watched"}).json()
    seen = [(entry["action"], entry["actor"].partition(":")[0], entry["target"]) for entry in answer["data"]]
    assert seen == [
        ("adapter.delete", "key", "law"),
        ("adapter.upload", "key", "law@1"),
        ("tenant.create", "admin", None),
    ]
    assert [answer["data"][index]["request_id"] for index in (0, 2)] == ["req-drop", "req-make"]
    assert answer["data"][1]["detail"]["digest"] == digest
    assert answer["has_more"] is False
    page = admin.get("/admin/audit", params={"tenant": "watched", "limit": 1}).json()
    assert page["has_more"] is True
    rest = admin.get("/admin/audit", params={"tenant": "watched", "before": page["data"][0]["id"]}).json()["data"]
    assert rest == answer["data"][1:]
