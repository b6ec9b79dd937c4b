"""Every route the app has, asked with every kind of key. Routes come from the app itself: a new one is in at once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from adapters_store.accounts.keys import KeySpec, Scope
from adapters_store.store import AdapterStore
from support.servers.raw_http import dial, head, read_response

Connect = Callable[..., httpx.Client]
OPEN = {"/health", "/ready", "/metrics"}
CONSOLE = {"/console", "/console/{name}"}  # files of the package: tests/server/api/console/test_page.py
ANY_KEY = {"/openapi.json"}  # says what the routes are, and nothing of any tenant


class Ask(NamedTuple):
    """One method of one route, with "1" for every parameter of its path."""

    method: str
    route: str
    path: str


@pytest.fixture(scope="module")
def asks(app: FastAPI) -> list[Ask]:
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert len(routes) == len(app.routes), "a route that is no APIRoute has no dependencies to check"
    filled = [(route, re.sub(r"\{\w+(:path)?\}", "1", route.path)) for route in routes]
    return [Ask(method, route.path, path) for route, path in filled for method in sorted(route.methods)]


@pytest.fixture(scope="module")
def guarded(asks: list[Ask]) -> list[Ask]:
    return [ask for ask in asks if ask.route not in OPEN | CONSOLE]


@pytest.fixture(scope="module")
def of_tenants(guarded: list[Ask]) -> list[Ask]:
    return [ask for ask in guarded if not ask.route.startswith("/admin") and ask.route not in ANY_KEY]


@pytest.fixture(scope="module")
def ended(store: AdapterStore, keys: dict[str, str]) -> dict[str, str]:
    """Keys that opened something once."""
    tenants = store.tenants
    for name in ("disabled", "deleted", "rotated"):
        keys = {**keys, name: tenants.create(name).api_key}
    tenants.set_disabled("disabled", True)
    tenants.delete("deleted")
    tenants.rotate_key("rotated")
    revoked = tenants.create_key("acme", KeySpec())
    tenants.revoke_key("acme", revoked.key_id)
    end = int(time.time()) + 4  # long enough that a busy machine asks once before
    expired = tenants.create_key("acme", KeySpec(expires_at=end)).api_key
    assert tenants.authenticate(expired) is not None
    time.sleep(max(0.0, end - time.time()) + 0.01)
    old = {name: keys[name] for name in ("disabled", "deleted", "rotated")}
    return {**old, "revoked": revoked.api_key, "expired": expired, "unknown": "ml-" + "A" * 43}


@pytest.fixture(scope="module")
def by_scope(store: AdapterStore, keys: dict[str, str], connect: Connect) -> dict[Scope, httpx.Client]:
    """Clients with a key of acme's that has one scope."""
    assert "acme" in keys
    new_keys = {scope: KeySpec(scopes=frozenset({scope})) for scope in Scope}
    return {scope: connect(store.tenants.create_key("acme", new).api_key) for scope, new in new_keys.items()}


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def all_of(client: httpx.Client, asks: list[Ask], **options: object) -> Iterator[tuple[Ask, httpx.Response]]:
    assert asks
    for ask in asks:
        yield ask, client.request(ask.method, ask.path, **options)  # type: ignore[arg-type]


def test_open_routes_are_three_and_tell_nothing_of_tenants(asks: list[Ask], connect: Connect) -> None:
    opened = [ask for ask in asks if ask.route in OPEN]
    assert len(opened) == 3
    for ask, response in all_of(connect(None), opened):
        assert response.status_code == 200, ask


def test_without_a_key_every_other_route_is_a_401(guarded: list[Ask], connect: Connect) -> None:
    for ask, response in all_of(connect(None), guarded):
        assert code_of(response) == (401, "missing_api_key"), ask
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("kind", ["unknown", "expired", "revoked", "rotated", "disabled", "deleted"])
def test_a_key_that_opens_nothing_opens_no_route(
    kind: str, guarded: list[Ask], ended: dict[str, str], connect: Connect
) -> None:
    for ask, response in all_of(connect(ended[kind]), guarded):
        assert code_of(response) == (401, "invalid_api_key"), ask


def test_no_route_takes_a_key_for_another_tenant_than_it_names(guarded: list[Ask], other: httpx.Client) -> None:
    for ask, response in all_of(other, guarded, headers={"X-Tenant-Id": "acme"}):
        assert code_of(response) == (403, "tenant_mismatch"), ask


@pytest.mark.parametrize("ref", ["law", "law@1", "acme/law", "acme/law@1"])
def test_no_route_answers_about_another_tenants_things(
    ref: str,
    app: FastAPI,
    of_tenants: list[Ask],
    client: httpx.Client,
    other: httpx.Client,
    upload: Callable[..., httpx.Response],
) -> None:
    assert upload(client, "law").status_code == 201
    with_parameters = [ask for ask in of_tenants if "{" in ask.route]
    aimed = [ask._replace(path=re.sub(r"\{\w+(:path)?\}", ref, ask.route)) for ask in with_parameters]
    for ask, response in all_of(other, aimed):
        assert response.status_code in (400, 404, 405, 415), (ask, response.text)
        assert b"sha256" not in response.content
    for route in ("/v1/models", "/v1/adapters"):
        assert client.get(f"{route}/{ref}").status_code == 200


def test_a_tenants_key_opens_no_admin_route(guarded: list[Ask], client: httpx.Client) -> None:
    admins = [ask for ask in guarded if ask.route.startswith("/admin")]
    for ask, response in all_of(client, admins):
        assert code_of(response) == (403, "admin_key_required"), ask


def test_an_admin_key_is_let_in_everywhere(guarded: list[Ask], admin: httpx.Client) -> None:
    for ask, response in all_of(admin, guarded):
        assert response.status_code not in (401, 403), (ask, response.text)
        assert response.status_code < 500, (ask, response.text)


def test_every_route_refuses_a_key_of_some_other_scope_and_takes_one_of_its_own(
    of_tenants: list[Ask], by_scope: dict[Scope, httpx.Client]
) -> None:
    for ask in of_tenants:
        answers = {scope: client.request(ask.method, ask.path) for scope, client in by_scope.items()}
        refused = {scope for scope, response in answers.items() if response.status_code == 403}
        assert 0 < len(refused) < len(Scope), (ask, refused)
        assert all(code_of(answers[scope])[1] == "insufficient_scope" for scope in refused)
        if ask.method != "GET":
            assert Scope.READ in refused, f"{ask}: a key that may only look may do something"


@pytest.mark.parametrize(
    ("method", "path", "scopes"),
    [
        ("POST", "/v1/completions", "inference"),
        ("POST", "/v1/chat/completions", "inference"),
        ("GET", "/v1/models", "inference read"),
        ("POST", "/v1/adapters", "adapters"),
        ("GET", "/v1/adapters", "adapters read"),
        ("DELETE", "/v1/adapters/1", "adapters"),
    ],
)
def test_a_route_takes_these_scopes(method: str, path: str, scopes: str, by_scope: dict[Scope, httpx.Client]) -> None:
    taken = [scope.value for scope, client in by_scope.items() if client.request(method, path).status_code != 403]
    assert sorted(taken) == scopes.split()


def test_no_key_of_a_single_scope_is_an_admins(guarded: list[Ask], by_scope: dict[Scope, httpx.Client]) -> None:
    admins = [ask for ask in guarded if ask.route.startswith("/admin")]
    for client in by_scope.values():
        for ask, response in all_of(client, admins):
            assert code_of(response) == (403, "admin_key_required"), ask


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1/models/",
        "/V1/models",
        "/v1/./models",
        "/health/../v1/models",
        "/health/%2e%2e/admin/tenants",
        "/metrics/../../admin/tenants",
        "/admin/tenants/",
        "/admin%2ftenants",
        "/v1/models;/health",
        "/health?/v1/models",
    ],
)
def test_no_spelling_of_a_path_gets_past_the_key(url: str, path: str) -> None:
    with dial(url) as connection:
        connection.sendall(head("GET", path, X_Original_URL="/health", X_Forwarded_Host="localhost"))
        response = read_response(connection)
    assert response.status in (401, 404) or (path.startswith("/health?") and response.body == b'{"status":"ok"}')
