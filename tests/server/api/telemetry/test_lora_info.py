"""`vllm:lora_requests_info`: what a router compares with a request's `model`, and what it takes for full."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from adapters_store.base.description import AdapterDigest
from adapters_store.packed.mix import Part, mix_of
from adapters_store.store import AdapterStore
from server.api.engine_client import EngineClient
from server.api.telemetry.lora_info import LOADED, MAX_IN_HOST, NAME, lora_info, lora_residency
from server.engine.metrics import EngineStats
from support.servers.waiting import wait_until
from support.worlds.adapter_memory import digest_of
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


def test_a_router_prefers_the_server_that_has_the_adapter(
    client: httpx.Client, other: httpx.Client, upload: Upload
) -> None:
    """After another owner of the same bytes asked for them too."""
    upload(client, "liked", seed=31)
    upload(other, "liked", seed=31)
    upload(client, "unliked", seed=32)
    assert status(client, "liked") == status(other, "liked") == 200
    texts = ("acme/liked", "acme/liked@1", "globex/liked", "globex/liked@1", "ft:tiny:acme:liked:1")
    wait_until(lambda: all(affinity_score(client, text) == 1.0 for text in texts))
    assert affinity_score(client, "acme/unliked") == 0.8
    assert [load_state_score(client, text) for text in (*texts, "acme/unliked")] == [1.0] * 5 + [0.6]


def affinity_score(client: httpx.Client, model: str) -> float:
    """llm-d's lora-affinity-scorer, by its rules (pkg/epp/framework/plugins/scheduling/scorer/loraaffinity)."""
    found = labels(client)
    active, waiting = (
        {name.strip() for name in found[f"{which}_lora_adapters"].split(",") if name.strip()}
        for which in ("running", "waiting")
    )
    if model in active:
        return 1.0
    if len(active) + len(waiting) < int(found["max_lora"]):
        return 0.8
    return 0.6 if model in waiting else 0.0


def load_state_score(client: httpx.Client, model: str) -> float:
    """The defaults of its lora-load-state-scorer: on the device, in host memory, a free slot, none."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    levels = {each.labels["level"] for each in samples if each.name == LOADED and each.labels["adapter_name"] == model}
    if levels:
        return 1.0 if "gpu" in levels else 0.7
    values = {each.name: each.value for each in samples}
    is_free = values["vllm:num_gpu_loaded_lora_adapters"] < values["vllm:max_gpu_lora_adapters"]
    return 0.6 if is_free else 0.0


def test_each_adapter_in_memory_is_listed_with_its_level_and_rank(
    store: AdapterStore, client: httpx.Client, upload: Upload
) -> None:
    digests = [AdapterDigest(upload(client, f"level{seed}", seed=seed).json()["digest"]) for seed in (41, 42)]
    on_device = tuple(digests[:1])
    stats = EngineStats(
        resident_adapters=on_device, held_adapters=tuple(digests), pinned_adapters=on_device, num_adapters_fit=3
    )
    loaded, *counts = lora_residency(stats, store.served_names, "tiny")
    found = {each.labels["adapter_name"]: each.labels for each in loaded.samples}
    assert {(found[name]["level"], found[name]["rank"]) for name in ("level41", "acme/level41@1")} == {("gpu", "4")}
    assert (found["acme/level42"]["level"], found["acme/level42"]["model_name"]) == ("cpu", "tiny")
    assert (found["level41"]["pinned"], found["acme/level42"]["pinned"]) == ("true", "false")
    assert [(each.samples[0].name, each.samples[0].value) for each in counts] == [
        ("vllm:num_gpu_loaded_lora_adapters", 1.0),
        ("vllm:num_cpu_loaded_lora_adapters", 1.0),
        ("vllm:max_gpu_lora_adapters", 4.0),
    ]


def test_mixes_in_host_memory_leave_the_list_to_adapters_with_a_name(
    store: AdapterStore, client: httpx.Client, upload: Upload
) -> None:
    digest = AdapterDigest(upload(client, "level43", seed=43).json()["digest"])
    mixes = [mix_of([Part(digest, 1 + index / 8192)]) for index in range(MAX_IN_HOST)]
    loaded, *_ = lora_residency(EngineStats(held_adapters=(*mixes, digest)), store.served_names, "tiny")
    assert "acme/level43@1" in {each.labels["adapter_name"] for each in loaded.samples}


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
    bench, names = make_bench(), [digest_of(name) for name in "abcd"]

    def has_room(waiting: tuple[AdapterDigest, ...] = ()) -> bool:
        resident = tuple(bench.resident())
        num_fit = bench.tiers.stats().num_more
        stats = EngineStats(resident_adapters=resident, queued_adapters=waiting, num_adapters_fit=num_fit)
        [sample] = lora_info(stats, store.served_names, "tiny").samples
        lists = (sample.labels["running_lora_adapters"], sample.labels["waiting_lora_adapters"])
        return sum(len(text.split(",")) for text in lists if text) < int(sample.labels["max_lora"])

    assert has_room()
    bench.bring(*names[:3])
    assert has_room()
    assert not has_room((names[3],))  # which takes the last room
    bench.bring(*names)
    assert not has_room()  # although 4 of 8 rows of the table are free
