"""Warm, pin and unpin over the socket, over the real engine."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

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


@pytest.mark.parametrize("verb", ["warm", "pin", "unpin"])
@pytest.mark.parametrize("ref", ["none", "none@1", "acme/mine", "globex/none", "tiny"])
def test_what_is_not_the_callers_is_a_404(
    client: httpx.Client, other: httpx.Client, upload: Upload, verb: str, ref: str
) -> None:
    upload(client, "mine", seed=4)
    assert code_of(ask(other, ref, verb)) == (404, "model_not_found")
