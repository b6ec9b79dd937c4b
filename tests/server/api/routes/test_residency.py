"""Warm, pin and unpin over the socket, over the real engine."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from adapters_store.accounts.records import Quotas
from adapters_store.errors import StoreError
from adapters_store.store import AdapterStore
from server.api.engine_client import EngineClient
from support.servers.waiting import wait_until

from ..conftest import ADMIN_KEY, MakeClient

Upload = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def engine(real_engine: EngineClient) -> EngineClient:
    return real_engine


@pytest.fixture(scope="module")
def operator(connect: MakeClient, keys: dict[str, str]) -> httpx.Client:
    assert "acme" in keys
    return connect(ADMIN_KEY, **{"X-Tenant-Id": "acme"})


def ask(client: httpx.Client, ref: str, verb: str) -> httpx.Response:
    return client.post(f"/v1/adapters/{ref}/{verb}")


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def warmed(client: httpx.Client, ref: str) -> bool:
    return ask(client, ref, "warm").json()["state"] == "device"


def test_a_tenant_warms_its_adapter_before_the_first_request(
    client: httpx.Client, upload: Upload, engine: EngineClient
) -> None:
    digest = upload(client, "law", seed=1).json()["digest"]
    upload(client, "law", seed=2)
    assert digest not in engine.stats().held_adapters
    first = ask(client, "law@1", "warm")
    assert first.status_code == 202
    body = first.json()
    assert body.pop("state") in ("loading", "device")
    assert body == {"id": "law@1", "object": "adapter.residency", "digest": digest, "pinned": False}
    wait_until(lambda: warmed(client, "law@1"))
    wait_until(lambda: digest in engine.stats().resident_adapters)
    assert ask(client, "law", "warm").json()["id"] == "law@2"
    answer = client.post("/v1/completions", json={"model": "law@1", "prompt": "hi", "max_tokens": 2})
    assert answer.status_code == 200


def test_only_an_operator_pins_and_what_leaves_service_is_pinned_no_more(
    client: httpx.Client, operator: httpx.Client, upload: Upload, engine: EngineClient
) -> None:
    digest = upload(client, "style", seed=3).json()["digest"]
    assert code_of(ask(operator, "style", "pin")) == (409, "adapter_not_resident")
    wait_until(lambda: warmed(client, "style"))
    for verb in ("pin", "unpin"):
        assert code_of(ask(client, "style", verb)) == (403, "admin_key_required")
    assert ask(operator, "style", "pin").json()["pinned"] is True
    assert ask(client, "style", "warm").json()["pinned"] is True
    assert ask(operator, "style", "unpin").json()["pinned"] is False
    assert ask(operator, "style", "pin").json()["pinned"] is True
    assert client.post("/v1/adapters/style/unload").status_code == 200
    wait_until(lambda: digest not in engine.stats().held_adapters)
    assert code_of(ask(client, "style", "warm")) == (404, "adapter_unloaded")
    client.post("/v1/adapters/style@1/activate")
    assert ask(client, "style", "warm").json()["pinned"] is False


def test_pins_and_unpins_are_in_the_audit_log_and_what_cannot_be_written_down_is_not_pinned(
    client: httpx.Client,
    operator: httpx.Client,
    upload: Upload,
    store: AdapterStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest = upload(client, "noted", seed=5).json()["digest"]
    ask(operator, "noted", "pin")  # refused: not on the device
    wait_until(lambda: warmed(client, "noted"))
    for verb in ("pin", "unpin"):
        assert ask(operator, "noted", verb).status_code == 200
    unpinned, pinned, uploaded = store.audit.entries(tenant="acme", limit=3)
    assert [each.action for each in (uploaded, pinned, unpinned)] == ["adapter.upload", "adapter.pin", "adapter.unpin"]
    assert {(each.actor, each.target, each.detail["digest"]) for each in (pinned, unpinned)} == {
        ("admin", "noted@1", digest)
    }

    def full(*_: object, **__: object) -> None:
        raise StoreError("disk_full", "no room for the row")

    with monkeypatch.context() as patched:
        patched.setattr(store.audit, "record", full)
        assert code_of(ask(operator, "noted", "pin")) == (503, "disk_full")
    assert ask(client, "noted", "warm").json()["pinned"] is False


def test_a_warm_counts_as_a_request_of_the_tenants_quota(
    client: httpx.Client, operator: httpx.Client, upload: Upload, store: AdapterStore
) -> None:
    upload(client, "counted", seed=6)
    store.quotas.set("acme", Quotas(requests_per_minute=3))
    try:
        answers = [ask(each, "counted", "warm") for each in (client, operator, client, client)]
        assert [each.status_code for each in answers] == [202, 202, 202, 429]
        assert code_of(answers[-1]) == (429, "requests_per_minute")
        assert 0 < float(answers[-1].headers["retry-after"]) <= 20
    finally:
        store.quotas.set("acme", Quotas())


@pytest.mark.parametrize("verb", ["warm", "pin", "unpin"])
@pytest.mark.parametrize("ref", ["none", "none@1", "acme/mine", "globex/none", "tiny"])
def test_what_is_not_the_callers_is_a_404(
    client: httpx.Client, other: httpx.Client, upload: Upload, verb: str, ref: str
) -> None:
    upload(client, "mine", seed=4)
    assert code_of(ask(other, ref, verb)) == (404, "model_not_found")
