"""A row whose numbers are not finite fails alone: others keep their bits, its blocks are wiped and not found again, and
the third such request of a tenant puts its adapter away, and no other tenant's with the same bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import AdapterUnavailable, NotFound
from adapters_store.store import AdapterStore
from server.engine.model.batch import Batch
from server.engine.numerics import NumericFaults, TenantAdapter
from server.engine.request import Request, SamplingParams
from server.engine.schedule import Schedule, ScheduledRow
from support.servers.service import NUM_TOKENS, TENANT, Service, make_base, running, save_adapters
from support.servers.waiting import wait_until
from support.worlds.adapter_memory import digest_of

A, B = digest_of("a"), digest_of("b")
KINDS = ("plain", "rslora")


def failing(*adapters: AdapterDigest | None, tenant: str = "law") -> list[Request]:
    return [Request(f"r{index}", tenant, [1], SamplingParams(), adapter) for index, adapter in enumerate(adapters)]


def test_the_kth_fault_puts_the_adapter_away_and_the_count_begins_anew() -> None:
    quarantined: list[tuple[TenantAdapter, str, str]] = []
    faults = NumericFaults(lambda *what: quarantined.append(what), limit=3)
    assert faults.record(failing(A)) == faults.record(failing(A, B)) == []
    assert faults.record(failing(B, A, A)) == [("law", A)]
    assert quarantined == [(("law", A), "adapter_numerics", "4 requests produced numbers that are not finite")]
    assert faults.record(failing(A)) == faults.record(failing(A)) == []
    assert faults.record(failing(A)) == [("law", A)]


def test_one_tenants_faults_are_no_evidence_against_anothers_adapter_of_the_same_bytes() -> None:
    quarantined: list[tuple[TenantAdapter, str, str]] = []
    faults = NumericFaults(lambda *what: quarantined.append(what), limit=3)
    for _ in range(7):
        faults.record(failing(A, tenant="attacker"))
    faults.record(failing(A, A, tenant="law"))
    assert {owned for owned, _, _ in quarantined} == {("attacker", A)}
    assert faults.record(failing(A, tenant="law")) == [("law", A)]


def test_faults_in_a_step_in_which_the_base_failed_too_are_nobodys() -> None:
    faults = NumericFaults(lambda *what: pytest.fail(f"put quarantined: {what}"), limit=1)
    assert faults.record(failing(A, None, A)) == []


def test_an_adapter_that_left_service_begins_anew() -> None:
    faults = NumericFaults(lambda *what: pytest.fail(f"put quarantined: {what}"), limit=2)
    faults.record(failing(A))
    faults.forget(A)
    assert faults.record(failing(A)) == []


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("numerics")
    base = make_base(folder / "base")
    adapters = save_adapters(base, folder / "adapters")
    with running(base, {kind: adapters[kind] for kind in KINDS}, folder / "data") as service:
        for kind in KINDS:
            service.tokens([1, 2, 3], kind, max_tokens=1)  # on the device now
        yield service


def slot_of(service: Service, kind: str) -> int:
    digest = service.versions[kind].digest
    return next(entry.slot for entry in service.parts.engine.tiers.resident() if entry.digest == digest)


def spoil(service: Service, kind: str, value: float) -> None:
    service.parts.adapters.table.scales[:, slot_of(service, kind)] = value


@pytest.fixture
def spoilt(service: Service) -> Iterator[Service]:
    """The adapter "plain" makes infinities."""
    scales = service.parts.adapters.table.scales
    sound = scales[:, slot_of(service, "plain")].clone()
    spoil(service, "plain", torch.inf)
    yield service
    scales[:, slot_of(service, "plain")] = sound


def wait_until_written(store: AdapterStore) -> None:
    """The thread that puts an adapter into quarantine has recorded it in the database and in the store's memory."""
    wait_until(lambda: store.quarantine.entries() != [] and "quarantine" not in {t.name for t in threading.enumerate()})


def logits_of(service: Service, first: list[int], others: list[list[int]]) -> torch.Tensor:
    """One forward of four rows, the second with the adapter "plain": [rows, vocabulary]."""
    runner = service.parts.engine._runner
    rows: list[ScheduledRow] = []
    for index, (kind, prompt) in enumerate(zip(("rslora", "plain", None, "rslora"), [first, *others], strict=True)):
        adapter = None if kind is None else service.versions[kind].digest
        request = Request(f"row{index}", TENANT, prompt, SamplingParams(max_tokens=2), adapter)
        request.block_ids = list(range(8 * index, 8 * index + 8))
        request.slot = None if kind is None else slot_of(service, kind)
        rows.append(ScheduledRow(request, 0, len(prompt)))
    schedule = Schedule(rows, sum(row.num_tokens for row in rows), 0)
    with torch.inference_mode():
        batch = Batch.build(
            schedule,
            block_size=runner.cache.block_size,  # type: ignore[attr-defined]
            table=service.parts.adapters.table,
            device=torch.device("cpu"),
        )
        return runner.forward(batch).clone()  # type: ignore[attr-defined,no-any-return]


def test_every_other_row_of_the_forward_keeps_its_bits(service: Service) -> None:
    prompts = [list(range(10, 30)), list(range(40, 57)), list(range(5, 14)), list(range(60, 91))]
    sound = logits_of(service, prompts[0], prompts[1:])
    scales = service.parts.adapters.table.scales
    before = scales[:, slot_of(service, "plain")].clone()
    spoil(service, "plain", torch.inf)
    poisoned = logits_of(service, prompts[0], prompts[1:])
    scales[:, slot_of(service, "plain")] = before
    assert not torch.isfinite(poisoned[1]).all()
    for row in (0, 2, 3):
        assert torch.equal(poisoned[row], sound[row]), f"row {row}"
    service.parts.engine._runner.zero_blocks(list(range(32)))  # what this test wrote behind the pool's back


def test_its_blocks_are_wiped_before_anybody_reads_them_and_are_not_found_again(spoilt: Service) -> None:
    pool, cache = spoilt.parts.engine.scheduler.pool, spoilt.parts.engine._runner.cache  # type: ignore[attr-defined]
    num_cached = len(pool._cache)
    final = spoilt.ask(list(range(100, 180)), "plain", max_tokens=4)[1].collect()[-1]
    assert final.error is not None
    assert final.error.code == "adapter_numerics"
    assert len(pool._cache) == num_cached
    assert not all(torch.isfinite(layer.keys).all() for layer in cache.layers), "nothing was poisoned"
    spoilt.tokens([7, 8, 9], None, max_tokens=1)  # any step wipes
    assert all(torch.isfinite(layer.keys).all() and torch.isfinite(layer.values).all() for layer in cache.layers)
    assert pool.num_free == pool.num_blocks


def test_the_third_failed_request_puts_the_adapter_away_until_an_operator_lets_it_out(spoilt: Service) -> None:
    version, store = spoilt.versions["plain"], spoilt.store
    spoilt.parts.engine._faults.forget(version.digest)
    for _ in range(3):
        assert store.resolve(TENANT, "plain").digest == version.digest
        final = spoilt.ask([5, 6, 7], "plain", max_tokens=4)[1].collect()[-1]
        assert final.error is not None
    wait_until_written(store)
    assert [entry.digest for entry in store.quarantine.entries()] == [version.digest]
    with pytest.raises(AdapterUnavailable, match="adapter_numerics") as refusal:
        store.resolve(TENANT, "plain")
    assert refusal.value.code == "adapter_quarantined"
    assert store.versions(TENANT, "plain")[0].quarantined == "adapter_numerics"
    assert store.resolve(TENANT, "rslora").digest == spoilt.versions["rslora"].digest
    assert spoilt.stats().counters["quarantined"] == 1
    store.quarantine.release(version.digest)
    assert store.resolve(TENANT, "plain").digest == version.digest
    with pytest.raises(NotFound):
        store.quarantine.release(version.digest)


def test_those_that_wait_for_it_are_answered_when_it_is_put_away(spoilt: Service) -> None:
    spoilt.parts.engine._faults.forget(spoilt.versions["plain"].digest)
    with spoilt.held():
        answers = [spoilt.ask([index, 6, 7], "plain", max_tokens=4)[1] for index in range(60)]
    codes = [final.error.code for answer in answers if (final := answer.collect()[-1]).error is not None]
    assert len(codes) == 60
    assert set(codes) == {"adapter_numerics", "adapter_quarantined"}
    wait_until(lambda: spoilt.store.quarantine.entries() != [])
    spoilt.store.quarantine.release(spoilt.versions["plain"].digest)


@pytest.fixture
def neighbour(service: Service) -> Iterator[str]:
    """A second tenant that has pushed the bytes of the adapter "plain"."""
    store, name = service.store, "neighbour"
    if name not in {tenant.name for tenant in store.tenants.list_tenants()}:
        store.tenants.create(name)
        weights = store.weights_of(service.versions["plain"].digest)
        config = (weights.parent / "adapter_config.json").read_bytes()
        base = service.parts.base.description
        theirs = store.publish(tenant=name, name="same", config=config, weights=weights, base=base)
        assert theirs.digest == service.versions["plain"].digest
    service.parts.engine._faults.forget(service.versions["plain"].digest)
    yield name
    for entry in store.quarantine.entries():
        store.quarantine.release(entry.digest, tenant=entry.tenant)


def test_a_tenants_prompts_disable_its_own_adapter_and_not_its_neighbours(spoilt: Service, neighbour: str) -> None:
    """Both have the same bytes; the requests of one fail. Requests of the other, waiting at that moment, go on."""
    digest, store = spoilt.versions["plain"].digest, spoilt.store
    with spoilt.held():
        mine = [spoilt.ask([index, 6, 7], "plain", max_tokens=1)[1] for index in range(40)]
        theirs = [spoilt.ask([index, 6, 7], "plain", max_tokens=1, tenant=neighbour)[1] for index in range(2)]
    mine_codes = {answer.collect()[-1].error.code for answer in mine}  # type: ignore[union-attr]
    assert mine_codes == {"adapter_numerics", "adapter_quarantined"}
    assert {answer.collect()[-1].error.code for answer in theirs} == {"adapter_numerics"}  # type: ignore[union-attr]
    wait_until_written(store)
    [entry] = store.quarantine.entries()
    assert (entry.digest, entry.tenant, entry.code) == (digest, TENANT, "adapter_numerics")
    with pytest.raises(AdapterUnavailable, match="adapter_numerics"):
        store.resolve(TENANT, "plain")
    assert store.resolve(neighbour, "same").digest == digest
    row = store.audit.entries(limit=1)[0]
    assert (row.action, row.tenant, row.target) == ("adapter.quarantine", TENANT, digest)


WORST: list[dict[str, Any]] = [
    {"repetition_penalty": 2.0**-126},
    {"repetition_penalty": 2.0**-126, "presence_penalty": -2.0, "frequency_penalty": -2.0, "temperature": 2.0},
    {"repetition_penalty": 10.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    {"logit_bias": tuple((id_, -100.0) for id_ in range(NUM_TOKENS)), "temperature": 1e-30},
    {"stop_token_ids": tuple(range(NUM_TOKENS)), "min_tokens": 4},
    {"stop_token_ids": tuple(range(NUM_TOKENS)), "min_tokens": 4, "temperature": 2.0, "top_p": 2.0**-126, "seed": 1},
]


def test_no_request_parameters_count_against_an_adapter(service: Service, neighbour: str) -> None:
    for params in WORST:
        for _ in range(3):
            final = service.ask([5, 6, 7], "plain", max_tokens=4, tenant=neighbour, **params)[1].collect()[-1]
            assert final.error is None, params
    assert service.parts.engine._faults._counts == {}
    assert service.store.quarantine.entries() == []
