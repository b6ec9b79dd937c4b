"""Warmed adapters come after all that requests want, and wait for no room; pins leave half of the pool to others."""

from __future__ import annotations

import pytest

from adapters_store.errors import BlobDamaged, Conflict, LimitReached
from adapters_store.tiers.entries import Owner, Residency
from adapters_store.tiers.tiers import MAX_WARMING
from support.worlds.adapter_memory import digest_of
from support.worlds.tiers_bench import Bench, make_bench

A, B, C, D, E = (digest_of(name) for name in "abcde")
ACME, GLOBEX = Owner("acme"), Owner("globex")


@pytest.fixture
def bench() -> Bench:
    """Four adapters of ten elements fit."""
    return make_bench()


def test_a_warmed_adapter_comes_though_no_request_wants_it(bench: Bench) -> None:
    assert bench.tiers.residency(A) == Residency("disk", pinned=False)
    bench.tiers.warm(A, ACME)
    assert bench.tiers.residency(A).state == "loading"
    bench.settle()
    assert bench.tiers.residency(A).state == "device"
    assert bench.loads == [(ACME, 10)]  # charged to the tenant that warms it
    bench.tiers.warm(A, ACME)
    bench.settle()
    assert bench.loads == [(ACME, 10)]


def test_without_room_it_stays_in_host_memory_and_holds_up_no_tenant(bench: Bench) -> None:
    wanted = {A: GLOBEX, B: GLOBEX, C: GLOBEX, D: GLOBEX}
    bench.tiers.update(wanted)
    bench.settle()
    for digest in wanted:
        bench.tiers.acquire(digest)
    bench.tiers.warm(E, ACME)
    bench.settle()
    assert bench.tiers.residency(E).state == "host"
    snapshot = bench.tiers.update(wanted)
    assert (snapshot.no_room_since, snapshot.over_share, snapshot.over_share_tenants) == ({}, frozenset(), frozenset())
    bench.tiers.release(A)
    bench.settle()
    assert bench.resident() == set(wanted)  # the wish was given up: only a new one brings it


def test_a_request_takes_the_last_room_before_a_warmed_adapter(bench: Bench) -> None:
    for digest in (A, B, C):
        bench.bring(digest)
        bench.tiers.acquire(digest)
    bench.tiers.warm(D, ACME)
    bench.tiers.update({E: GLOBEX})
    bench.settle()
    assert bench.tiers.residency(E).state == "device"
    assert bench.tiers.residency(D).state == "host"


def test_a_tenant_warms_a_few_at_once_and_others_still_may(bench: Bench) -> None:
    for index in range(MAX_WARMING):
        bench.tiers.warm(digest_of(f"warm{index}"), ACME)
    with pytest.raises(LimitReached, match=f"{MAX_WARMING} adapters .* the limit is {MAX_WARMING}") as caught:
        bench.tiers.warm(A, ACME)
    assert caught.value.code == "too_many_warming"
    bench.tiers.warm(A, GLOBEX)
    bench.settle()
    bench.tiers.warm(B, ACME)


def test_a_warmed_adapter_that_cannot_be_loaded_leaves_nothing_behind(bench: Bench) -> None:
    bench.disk.errors[A] = BlobDamaged("blob_damaged", "A is damaged")
    bench.tiers.warm(A, ACME)
    bench.settle()
    assert bench.tiers.residency(A).state == "disk"
    with pytest.raises(BlobDamaged):
        bench.tiers.warm(A, ACME)
    assert bench.tiers.residency(A).state == "disk"
    bench.tiers.warm(B, ACME)
    bench.tiers.forget(B)
    bench.settle()
    assert bench.tiers.residency(B).state != "device"


def test_pins_leave_half_of_the_pool(bench: Bench) -> None:
    with pytest.raises(Conflict) as caught:
        bench.tiers.pin_resident(A)
    assert caught.value.code == "adapter_not_resident"
    bench.bring(A, B, C)
    bench.tiers.pin_resident(A)
    bench.tiers.pin_resident(B)
    bench.tiers.pin_resident(B)
    with pytest.raises(Conflict, match=r"75% .* at most 50% may be pinned") as caught:
        bench.tiers.pin_resident(C)
    assert caught.value.code == "pin_limit"
    assert [bench.tiers.residency(each).pinned for each in (A, B, C)] == [True, True, False]
    bench.bring(C, D)
    bench.bring(E)
    assert {A, B} <= bench.resident()
    bench.tiers.unpin(A)
    bench.tiers.pin_resident(E)


def test_warming_evicts_a_tenants_own_and_none_of_one_within_its_share(bench: Bench) -> None:
    bench.tiers.update({A: GLOBEX, B: GLOBEX})
    bench.settle()
    bench.tiers.update({})
    for digest in (C, D, E, digest_of("f"), digest_of("g")):
        bench.tiers.warm(digest, ACME)
        bench.settle()
        assert bench.tiers.residency(digest).state == "device"
        assert {A, B} <= bench.resident()
