"""`vllm:lora_requests_info`: what a router compares with a request's `model`, and what it takes for full."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from adapters_store.base.description import AdapterDigest
from adapters_store.store import AdapterStore
from server.api.engine_client import EngineClient
from server.api.telemetry.lora_info import NAME, lora_info
from support.servers.waiting import wait_until
from support.worlds.adapter_memory import digest_of
from support.worlds.fake_engine import FakeStats
from support.worlds.tiers_bench import make_bench

ASK = {"prompt": "hello", "max_tokens": 2, "temperature": 0}
Upload = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def engine(real_engine: EngineClient) -> EngineClient:
    return real_engine


def labels(client: httpx.Client) -> dict[str, str]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    [sample] = [sample for family in families for sample in family.samples if sample.name == NAME]
    return dict(sample.labels)


def running(client: httpx.Client) -> set[str]:
    return set(filter(None, labels(client)["running_lora_adapters"].split(",")))


def status(client: httpx.Client, model: str) -> int:
    return client.post("/v1/completions", json={**ASK, "model": model}).status_code


def test_every_text_that_reaches_a_resident_adapter_is_listed_for_all_its_owners(
    client: httpx.Client, other: httpx.Client, upload: Upload, admin: httpx.Client
) -> None:
    """acme and globex own the same bytes: one adapter on the device, and neither hides the other."""
    upload(client, "style", seed=1)
    upload(client, "mine", seed=2)
    upload(other, "style", seed=3)
    upload(other, "twin", seed=2)
    upload(client, "style", seed=4)
    for model in ("style@1", "mine"):
        assert status(client, model) == 200
    of_mine = {"acme/mine", "acme/mine@1", "mine", "mine@1", "ft:tiny:acme:mine:1"}
    of_twin = {"globex/twin", "globex/twin@1", "twin", "twin@1", "ft:tiny:globex:twin:1"}
    old = {"acme/style@1", "ft:tiny:acme:style:1"}  # no longer what the name means, and globex has a style too
    wait_until(lambda: running(client) == of_mine | of_twin | old)
    for text in of_mine | old:
        assert status(client, text) == 200, text
    for text in of_twin:
        assert status(other, text) == 200, text
    for text in of_mine | of_twin | old:
        if "/" in text or ":" in text:
            assert status(admin, text) == 200, text
    wait_until(lambda: running(client) == of_mine | of_twin | old)  # nothing else was brought to the device


def test_a_name_that_changes_its_meaning_is_listed_for_the_new_one(client: httpx.Client, upload: Upload) -> None:
    for seed in (11, 12):
        upload(client, "moved", seed=seed)
        assert status(client, "moved") == 200
    wait_until(lambda: {"moved@1", "moved@2", "moved"} <= running(client))
    client.post("/v1/adapters/moved/unload")
    wait_until(lambda: not {"moved@1", "moved@2", "moved"} & running(client))


def test_the_engines_numbers_are_shown_while_the_database_is_away(
    client: httpx.Client, store: AdapterStore, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(client, "kept", seed=21)
    assert status(client, "kept") == 200
    wait_until(lambda: "kept" in running(client))

    def away() -> int:
        raise OperationalError("select", {}, Exception("away"))

    monkeypatch.setattr(store.database, "generation", away)
    assert "kept" in running(client)


def test_a_server_is_full_when_no_more_bytes_fit(store: AdapterStore) -> None:
    """The router's rule: there is room where the names running and waiting are fewer than max_lora."""
    bench, slots, names = make_bench(), 8, [digest_of(name) for name in "abcd"]

    def has_room(waiting: tuple[AdapterDigest, ...] = ()) -> bool:
        resident = tuple(bench.resident())
        num_fit = bench.tiers.stats().num_more(len(resident), slots)
        stats = FakeStats(resident_adapters=resident, queued_adapters=waiting, num_adapters_fit=num_fit)
        [sample] = lora_info(stats, store.served_names, "tiny").samples
        lists = (sample.labels["running_lora_adapters"], sample.labels["waiting_lora_adapters"])
        return sum(len(text.split(",")) for text in lists if text) < int(sample.labels["max_lora"])

    assert has_room()
    bench.bring(*names[:3])
    assert has_room()
    assert not has_room((names[3],))  # which takes the last room
    bench.bring(*names)
    assert not has_room()  # although 4 of 8 rows of the table are free
