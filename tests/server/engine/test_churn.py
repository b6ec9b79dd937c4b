"""Adapters come, go and change their names' meaning while requests run: every answer equals its quiet run, and those of
prompts that ask for a schema, an expression or a tool call follow it."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.versions.records import AdapterVersion
from server.engine.schedule import SchedulerSettings
from server.engine.startup.settings import MemoryBudget
from support.models.grammars import short_grammars
from support.models.models import adapter_configs, save_adapter
from support.servers.service import Answer, Service, publish, running

NUM_REQUESTS = int(os.environ.get("MULTILORA_CHURN_REQUESTS", "500"))
NUM_ADAPTERS = 18
MAX_TOKENS = 12
NUM_PROMPTS = 6
BURST = 20  # requests that arrive together, so that a batch is full on any machine
GRAMMAR_OF = dict(zip((3, 4, 5), short_grammars(), strict=True))  # the other prompts are answered freely
POOL_BYTES = 420_000  # two or three of the largest adapters: an adapter is evicted nearly every step
KV_BYTES = 120_000  # 39 blocks: a full batch runs out of them, and requests are preempted


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of all kinds, each with weights of its own."""
    root = tmp_path_factory.mktemp("churn")
    configs = list(
        adapter_configs(["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]).values()
    )
    return [save_adapter(base, root / str(i), configs[i % len(configs)], seed=100 + i) for i in range(NUM_ADAPTERS)]


@pytest.fixture(scope="module")
def churned(base: Path, folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    names = {f"a{index}": folder for index, folder in enumerate(folders)}
    limits = {
        "block_size": 4,
        "memory": MemoryBudget(kv_cache=KV_BYTES, adapter_pool=POOL_BYTES, host_cache=1_500_000),
        "scheduler": SchedulerSettings(max_batch_tokens=96, max_running=12, starvation_s=0.05),
    }
    with running(base, names, tmp_path_factory.mktemp("data"), **limits) as service:
        yield service


@pytest.fixture(scope="module")
def quiet(churned: Service, prompts: list[list[int]]) -> dict[tuple[str, int], list[int]]:
    """One request at a time: (digest, prompt) -> tokens."""
    return {
        (version.digest, index): asked(churned, prompts, index, version)[1].tokens()
        for version in churned.versions.values()
        for index in range(NUM_PROMPTS)
    }


def asked(service: Service, prompts: list[list[int]], index: int, version: AdapterVersion) -> tuple[str, Answer]:
    grammar = GRAMMAR_OF.get(index)
    if grammar is None:
        return service.ask(prompts[index], version, max_tokens=MAX_TOKENS)
    return service.ask(prompts[index], version, max_tokens=grammar.max_tokens, constraint=grammar.start())


class Churner(threading.Thread):
    """Keeps re-publishing one name with changing content and deleting another, as a tenant's scripts would."""

    def __init__(self, service: Service, folders: list[Path]) -> None:
        super().__init__()
        self._service, self._folders = service, folders
        self._random = random.Random(5)
        self.is_over = threading.Event()
        self.num_changes = 0
        self.latest: list[AdapterVersion] = []

    def run(self) -> None:
        service = self._service
        while not self.is_over.is_set():
            folder = self._random.choice(self._folders)
            version = publish(service.store, service.parts, "changing", folder)
            self.latest = [*self.latest[-3:], version]
            if self._random.random() < 0.3:
                old = self._random.choice(service.store.versions(version.tenant, "changing"))
                service.worker.forget_adapters(service.store.delete(old.tenant, f"changing@{old.version}"))
            self.num_changes += 1


def test_every_answer_equals_its_quiet_run(
    churned: Service, folders: list[Path], prompts: list[list[int]], quiet: dict[tuple[str, int], list[int]]
) -> None:
    for (_, index), tokens in quiet.items():
        if index in GRAMMAR_OF:
            GRAMMAR_OF[index].check_whole(tokens)
    rng = random.Random(11)
    churner = Churner(churned, folders)
    churner.start()
    pending: list[tuple[AdapterVersion, int, Answer, bool]] = []
    num_right = num_aborted = num_refused = num_tokens = 0

    def settle(version: AdapterVersion, index: int, answer: Answer, was_aborted: bool) -> None:
        nonlocal num_right, num_aborted, num_refused, num_tokens
        events = answer.collect()
        tokens = [token for event in events for token in event.token_ids]
        expected = quiet[version.digest, index]
        num_tokens += len(tokens)
        reason = events[-1].finish_reason
        if reason == "error":  # its version was deleted before it was loaded
            assert events[-1].error is not None
            assert version.name == "changing"
            num_refused += 1
        elif reason == "abort":
            assert was_aborted
            assert tokens == expected[: len(tokens)]
            num_aborted += 1
        else:
            assert tokens == expected
            num_right += 1

    try:
        for start in range(0, NUM_REQUESTS, BURST):
            aborted = []
            with churned.held():
                for _ in range(min(BURST, NUM_REQUESTS - start)):
                    choices = [*churned.versions.values(), *churner.latest]
                    version, index = rng.choice(choices), rng.randrange(NUM_PROMPTS)
                    request_id, answer = asked(churned, prompts, index, version)
                    aborts = rng.random() < 0.05
                    if aborts:
                        aborted.append(request_id)
                    pending.append((version, index, answer, aborts))
            for request_id in aborted:
                churned.worker.abort(request_id)
            while len(pending) > BURST:
                settle(*pending.pop(rng.randrange(BURST)))
        for item in pending:
            settle(*item)
    finally:
        churner.is_over.set()
        churner.join()

    counters = churned.stats().counters
    assert num_right + num_aborted + num_refused == NUM_REQUESTS
    print(f"{num_tokens} tokens of {NUM_REQUESTS} requests compared, {churner.num_changes} uploads meanwhile")
    assert num_right > 0.85 * NUM_REQUESTS
    assert counters["adapter_evictions"] > NUM_REQUESTS / 20
    assert counters["preemptions"] > 0
    assert churner.num_changes > 20
    pool = churned.parts.engine.scheduler.pool
    assert pool.num_free == pool.num_blocks
    assert all(resident.ref_count == 0 for resident in churned.parts.engine.tiers.resident())
    gc.collect()
    assert not any(grammar.living for grammar in GRAMMAR_OF.values()), "a matcher outlived its request"
