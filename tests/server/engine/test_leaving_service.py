"""Adapters deleted or unloaded while they answer: requests under way end as they would have, then all is freed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Gauge

from adapters_store.base.description import AdapterDigest
from server.api.background import StoreWatch
from server.engine.startup.settings import MemoryBudget
from support.servers.service import TENANT, Answer, Service, publish, running
from support.servers.waiting import wait_until


@pytest.fixture
def scarce(base: Path, adapters: dict[str, Path], tmp_path: Path) -> Iterator[Service]:
    """Too few KV blocks for all, so that requests are preempted."""
    with running(base, adapters, tmp_path, memory=MemoryBudget(kv_cache=350_000, adapter_pool=4 << 20)) as service:
        yield service


def held(service: Service) -> tuple[AdapterDigest, ...]:
    return service.stats().held_adapters


def ask_twelve(service: Service, prompts: list[list[int]]) -> list[Answer]:
    with service.held():  # together, so that blocks are scarce on any machine
        return [service.ask(prompt, "plain", max_tokens=48)[1] for prompt in prompts[:12]]


def test_requests_under_way_end_with_the_tokens_they_would_have_had(scarce: Service, prompts: list[list[int]]) -> None:
    """Also those that are preempted after the files are gone."""
    quiet = [answer.tokens() for answer in ask_twelve(scarce, prompts)]
    before = scarce.stats().counters["preemptions"]
    answers = ask_twelve(scarce, prompts)
    wait_until(lambda: any(answer.events.qsize() for answer in answers))
    scarce.worker.forget_adapters(scarce.store.delete(TENANT, "plain"))
    assert [answer.tokens() for answer in answers] == quiet
    wait_until(lambda: scarce.versions["plain"].digest not in held(scarce))
    assert scarce.stats().counters["preemptions"] > before


def test_an_unloaded_adapter_leaves_both_tiers_and_others_stay(service: Service, prompts: list[list[int]]) -> None:
    for kind in ("plain", "rslora"):
        service.tokens(prompts[0], kind)
    wait_until(lambda: {service.versions[kind].digest for kind in ("plain", "rslora")} <= set(held(service)))
    service.worker.forget_adapters(service.store.aliases.unload(TENANT, "plain"))
    wait_until(lambda: service.versions["plain"].digest not in held(service))
    assert service.versions["rslora"].digest in held(service)
    service.store.aliases.activate(TENANT, "plain", 1)
    assert service.tokens(prompts[0], "plain")


def test_what_a_command_deleted_leaves_a_running_servers_memory(
    service: Service, adapters: dict[str, Path], prompts: list[list[int]], tmp_path: Path
) -> None:
    """Deleted through another store on the same folder, as a command of another process does."""
    folder = shutil.copytree(adapters["one"], tmp_path / "own")
    version = publish(service.store, service.parts, "short-lived", folder)
    service.tokens(prompts[0], version)
    watch = StoreWatch(service.store, service.worker, Gauge("away", "", registry=None), poll_s=0.02, at_least_s=0.1)
    watch.start()
    try:
        wait_until(lambda: version.digest in held(service))
        service.store.delete(TENANT, "one")  # the same content: still held for the other name
        wait_until(lambda: version.digest in held(service))
        service.store.delete(TENANT, "short-lived")
        wait_until(lambda: version.digest not in held(service))
    finally:
        watch.stop()
