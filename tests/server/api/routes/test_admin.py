"""/admin/tenants: make, list, rotate, delete."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from support.worlds.fake_engine import FakeEngine


def test_a_new_tenant_comes_with_its_key_once(admin: httpx.Client, connect: Callable[..., httpx.Client]) -> None:
    response = admin.post("/admin/tenants", json={"name": "fresh"})
    assert response.status_code == 201
    body = response.json()
    assert body.keys() == {"id", "object", "tenant", "created", "disabled", "api_key"}
    assert (body["id"], body["object"], body["tenant"]) == ("fresh", "tenant", "fresh")
    assert connect(body["api_key"]).get("/v1/models").status_code == 200
    shown = admin.get("/admin/tenants/fresh").json()
    assert "api_key" not in shown
    assert shown["created"] == body["created"]


def test_a_name_is_taken_once(admin: httpx.Client) -> None:
    assert admin.post("/admin/tenants", json={"name": "twice"}).status_code == 201
    response = admin.post("/admin/tenants", json={"name": "twice"})
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "tenant_exists"
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("body", [{}, {"name": "../x"}, {"name": 5}, {"name": "x", "plan": "pro"}, {"name": "x" * 129}])
def test_a_bad_tenant_is_a_400(admin: httpx.Client, body: dict[str, object]) -> None:
    assert admin.post("/admin/tenants", json=body).status_code == 400


def test_the_list_comes_in_pages(admin: httpx.Client) -> None:
    names = [f"page-{index}" for index in range(5)]
    for name in names:
        admin.post("/admin/tenants", json={"name": name})
    seen, after = [], None
    while True:
        query = {"limit": 2} if after is None else {"limit": 2, "after": after}
        page = admin.get("/admin/tenants", params=query).json()
        seen += [tenant["id"] for tenant in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert [name for name in seen if name.startswith("page-")] == names
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=1001", "after=nobody"])
def test_a_bad_page_is_a_400_that_names_the_parameter(admin: httpx.Client, query: str) -> None:
    response = admin.get(f"/admin/tenants?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]


def test_a_deleted_tenants_adapters_leave_the_engines_memory(
    admin: httpx.Client,
    connect: Callable[..., httpx.Client],
    upload: Callable[..., httpx.Response],
    fake_engine: FakeEngine,
) -> None:
    key = admin.post("/admin/tenants", json={"name": "emptied"}).json()["api_key"]
    digest = upload(connect(key), "bulky", seed=78).json()["digest"]
    admin.delete("/admin/tenants/emptied")
    assert digest in fake_engine.forgotten


def test_a_deleted_tenants_key_and_adapters_are_gone(
    admin: httpx.Client, connect: Callable[..., httpx.Client], upload: Callable[..., httpx.Response]
) -> None:
    key = admin.post("/admin/tenants", json={"name": "leaving"}).json()["api_key"]
    leaving = connect(key)
    digest = upload(leaving, "farewell", seed=77).json()["digest"]
    deleted = admin.delete("/admin/tenants/leaving").json()
    assert deleted == {"id": "leaving", "object": "tenant.deleted", "deleted": True, "digests": [digest]}
    assert leaving.get("/v1/models").status_code == 401
    assert admin.get("/admin/tenants/leaving").status_code == 404
    ask = {"model": "leaving/farewell", "prompt": "x"}
    assert admin.post("/v1/completions", json=ask).status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/nobody"), ("DELETE", "/nobody"), ("POST", "/nobody/rotate-key")],
)
def test_an_unknown_tenant_is_a_404(admin: httpx.Client, method: str, path: str) -> None:
    response = admin.request(method, f"/admin/tenants{path}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "tenant_not_found"
