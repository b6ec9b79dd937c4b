"""Who may ask what: keys, the tenant header, and that no route was forgotten."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import httpx
import pytest
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from server.api.auth import Caller, authenticate, require_admin

ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 1, "temperature": 0}
OPEN = {"/health", "/ready", "/metrics"}
CONSOLE = {"/console", "/console/{name}"}  # files of the package, the same for everyone


def guards(dependant: Dependant) -> Iterator[object]:
    for inner in dependant.dependencies:
        yield inner.call
        yield from guards(inner)


def test_every_route_but_three_and_the_consoles_files_asks_who_is_there(app: FastAPI) -> None:
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert len(routes) == len(app.routes), "a route that is no APIRoute has no dependencies to check"
    unguarded = {route.path for route in routes if authenticate not in guards(route.dependant)}
    assert unguarded == OPEN | CONSOLE
    not_admins = [r.path for r in routes if r.path.startswith("/admin") and require_admin not in guards(r.dependant)]
    assert not_admins == []


def test_no_dependency_of_a_route_is_run_on_a_thread(app: FastAPI) -> None:
    """FastAPI runs every dependency that is no coroutine function, a class too, on a thread: two switches a request."""
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    calls = {call for route in routes for call in guards(route.dependant)}
    assert len(calls) > 10
    assert [call for call in calls if not inspect.iscoroutinefunction(call)] == []


def test_every_guarded_route_answers_401_without_a_key(app: FastAPI, connect: Callable[..., httpx.Client]) -> None:
    nobody = connect(None)
    for route in app.routes:
        assert isinstance(route, APIRoute)
        for method in route.methods:
            path = route.path.replace("{name}", "x").replace("{name:path}", "x").replace("{model:path}", "x")
            response = nobody.request(method, path)
            if route.path in CONSOLE:
                assert response.status_code == (404 if path == "/console/x" else 200)
            elif route.path in OPEN:
                assert response.status_code == 200
            else:
                assert response.status_code == 401, (method, path)
                assert response.json()["error"]["code"] == "missing_api_key"
                assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "authorization",
    ["Bearer wrong", "Bearer", "Basic abc", "bearer" + " x" * 400, "ml-naked-key", "Bearer \xff\xfe"],
)
def test_an_unknown_key_is_a_401(connect: Callable[..., httpx.Client], authorization: str) -> None:
    response = connect(None).post(
        "/v1/completions", json=ASK, headers={"Authorization": authorization.encode("latin-1")}
    )
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_two_authorization_headers_are_not_one(connect: Callable[..., httpx.Client], keys: dict[str, str]) -> None:
    headers = [("Authorization", f"Bearer {keys['acme']}"), ("Authorization", "Bearer x")]
    assert connect(None).post("/v1/completions", json=ASK, headers=headers).status_code == 401


def test_a_key_speaks_for_its_tenant(client: httpx.Client) -> None:
    assert client.post("/v1/completions", json=ASK).status_code == 200
    assert client.post("/v1/completions", json=ASK, headers={"X-Tenant-Id": "acme"}).status_code == 200


def test_a_key_does_not_speak_for_another_tenant(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json=ASK, headers={"X-Tenant-Id": "globex"})
    assert response.status_code == 403
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("permission_error", "tenant_mismatch", "X-Tenant-Id")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x" * 129, "a b"])
def test_a_tenant_header_that_is_no_name_is_a_400(admin: httpx.Client, name: str) -> None:
    response = admin.post("/v1/completions", json=ASK, headers={"X-Tenant-Id": name})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Tenant-Id"


def test_two_tenant_headers_are_not_one(admin: httpx.Client) -> None:
    """A proxy may read the first and we the last."""
    headers = [("X-Tenant-Id", "acme"), ("X-Tenant-Id", "globex")]
    response = admin.post("/v1/completions", json=ASK, headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["message"], error["param"]) == ("X-Tenant-Id must be sent once, got 2 values", "X-Tenant-Id")


def test_an_admin_key_speaks_for_the_tenant_it_names(
    admin: httpx.Client, upload: Callable[..., httpx.Response], client: httpx.Client
) -> None:
    assert upload(client, "spoken-for").status_code == 201
    as_acme = {"X-Tenant-Id": "acme"}
    assert admin.post("/v1/completions", json={**ASK, "model": "spoken-for"}, headers=as_acme).status_code == 200
    assert admin.post("/v1/completions", json={**ASK, "model": "acme/spoken-for"}).status_code == 200
    as_globex = {"X-Tenant-Id": "globex"}
    for model in ("spoken-for", "acme/spoken-for"):
        response = admin.post("/v1/completions", json={**ASK, "model": model}, headers=as_globex)
        assert response.status_code == 404


def test_a_tenants_key_opens_no_admin_route(client: httpx.Client) -> None:
    response = client.get("/admin/tenants")
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "admin_key_required"


def test_a_rotated_key_opens_nothing(admin: httpx.Client, connect: Callable[..., httpx.Client]) -> None:
    old = admin.post("/admin/tenants", json={"name": "rotating"}).json()["api_key"]
    assert connect(old).get("/v1/models").status_code == 200
    new = admin.post("/admin/tenants/rotating/rotate-key").json()["api_key"]
    assert connect(old).get("/v1/models").status_code == 401
    assert connect(new).get("/v1/models").status_code == 200


def test_a_caller_bound_to_a_tenant_speaks_for_no_other() -> None:
    assert Caller("acme").may_speak_for("acme")
    assert not Caller("acme", is_admin=True).may_speak_for("globex")
    assert Caller("acme", speaks_for_all=True).may_speak_for("globex")
