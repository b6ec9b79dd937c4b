"""Pinned adapters stay, deleted ones are removed, and neither harms running requests."""

from __future__ import annotations

import pytest

from support.worlds.adapter_memory import digest_of
from support.worlds.tiers_bench import Bench, make_bench

A, B, C, D, E = (digest_of(name) for name in "abcde")


@pytest.fixture
def bench() -> Bench:
    return make_bench()


def test_pinned_adapters_stay_without_being_used(bench: Bench) -> None:
    bench.bring(A, B)
    bench.tiers.pin(A)
    bench.tiers.pin(B)
    assert all(entry.pinned for entry in bench.tiers.resident())
    bench.bring(C, D)
    bench.tiers.update([E])
    bench.settle()
    assert {A, B, E} <= bench.resident()
    bench.tiers.unpin(A)
    bench.tiers.unpin(B)
    bench.bring(C, D)
    bench.bring(A, B)
    bench.bring(C, D, E)


def test_one_that_pinned_adapters_leave_no_room_for_fails_instead_of_waiting_for_ever(bench: Bench) -> None:
    bench.bring(A)
    bench.tiers.pin(A)
    bench.disk.sizes[B] = 31
    bench.tiers.update([B])
    bench.settle()
    assert [error.code for error in bench.tiers.update([B]).failures.values()] == ["adapter_pool_pinned"]
    assert not bench.tiers._no_room_since


def test_unpinning_lets_the_waiting_one_on(bench: Bench) -> None:
    bench.disk.sizes |= {A: 20, B: 20, C: 20}
    bench.bring(A, B)
    bench.tiers.acquire(B)
    bench.tiers.pin(A)
    bench.tiers.update([C])
    bench.settle()
    assert C not in bench.resident()
    bench.tiers.unpin(A)
    bench.tiers.poll()
    assert bench.resident() == {B, C}


def test_a_deleted_adapter_leaves_both_tiers_at_once_if_nobody_uses_it(bench: Bench) -> None:
    bench.bring(A)
    bench.tiers.forget(A)
    assert bench.resident() == set()
    assert bench.host.find(A) is None
    assert bench.device.table == {}


def test_a_deleted_adapter_leaves_the_device_with_its_last_user(bench: Bench) -> None:
    bench.bring(A)
    slot = bench.tiers.acquire(A)
    bench.tiers.acquire(A)
    assert slot is not None
    bench.tiers.forget(A)
    bench.tiers.release(A)
    assert bench.device.read(slot) == 1 + ord("a")
    bench.tiers.release(A)
    assert bench.resident() == set()
    assert bench.device.table == {}


@pytest.mark.parametrize("moment", ["queued", "loading", "in host memory", "copying"])
def test_a_deleted_adapter_is_not_brought_back_by_an_old_wish(bench: Bench, moment: str) -> None:
    bench.delay[0] = 2
    bench.disk.sizes[B] = 40
    if moment == "in host memory":
        bench.bring(B)
        bench.tiers.acquire(B)
    bench.tiers.update([A])
    if moment == "loading":
        bench.disk.meanwhile = lambda: bench.tiers.forget(A)
    if moment != "queued":
        bench.host.load_next()
        bench.tiers.poll()
    assert ({A} <= bench.resident()) == (moment == "copying")
    if moment != "loading":
        bench.tiers.forget(A)
    if moment == "in host memory":
        bench.tiers.release(B)
        bench.disk.sizes[B] = 1
    bench.settle()
    assert A not in bench.resident()
    assert bench.host.find(A) is None
    assert bench.host.stats().num_bytes == (160 if moment == "in host memory" else 0)


def test_the_same_content_uploaded_again_is_served_again(bench: Bench) -> None:
    bench.bring(A)
    bench.tiers.acquire(A)
    bench.tiers.forget(A)
    assert bench.tiers.acquire(A) is not None  # an upload of the same bytes while the old one is in use
    bench.tiers.release(A)
    bench.tiers.release(A)
    assert bench.resident() == {A}
    bench.tiers.forget(A)
    bench.bring(A)


def test_one_deleted_while_copying_and_wanted_anew_comes_again(bench: Bench) -> None:
    bench.delay[0] = 3
    bench.tiers.update([A])
    bench.host.load_next()
    bench.tiers.poll()
    bench.tiers.forget(A)
    bench.tiers.update([A])
    bench.settle()
    assert list(bench.tiers.ready()) == [A]
