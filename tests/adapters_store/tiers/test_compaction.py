"""Moving adapters while nobody uses any: what is free comes together, and nobody is harmed by it."""

from __future__ import annotations

import random

import pytest

from adapters_store.tiers.compaction import Move, next_move
from adapters_store.tiers.device_pool import DevicePool, DevicePoolSettings, EntryState, PoolEntry
from support.worlds.adapter_memory import FakeClock, digest_of
from support.worlds.tiers_bench import Bench, make_bench

A, B, C, D, E = (digest_of(name) for name in "abcde")


def make_pool(sizes: dict[str, int], capacity: int = 100) -> DevicePool:
    """Entries one behind the other; those named in capitals leave their places."""
    pool = DevicePool(
        DevicePoolSettings(capacity_elements=capacity, max_slots=64, alignment_elements=1, hold_s=0), FakeClock()
    )
    entries = []
    for name, size in sizes.items():
        reservation = pool.reserve(digest_of(name), size)
        assert reservation is not None
        pool.mark_ready(reservation.entry)
        entries.append(reservation.entry)
    for entry in entries:
        if entry.digest[-1].isupper():
            pool.remove(entry)
    return pool


def entry_of(pool: DevicePool, name: str) -> PoolEntry:
    entry = pool.get(digest_of(name))
    assert entry is not None
    return entry


def compact(pool: DevicePool) -> list[tuple[str, int]]:
    """All moves: whom, and where to."""
    moves = []
    while (move := pool.next_move()) is not None:
        assert move.target < move.entry.offset
        pool.begin_move(move)
        pool.end_move(move.entry)
        moves.append((move.entry.digest[-1], move.target))
    return moves


def test_the_highest_that_fits_a_lower_hole_goes_there() -> None:
    pool = make_pool({"A": 10, "b": 10, "C": 20, "d": 20, "e": 10}, capacity=80)
    assert compact(pool) == [("e", 0), ("d", 20)]
    assert pool.largest_hole == pool.num_free_elements == 40


def test_what_fits_nowhere_slides_down_over_its_own_place() -> None:
    pool = make_pool({"A": 5, "b": 20, "C": 5, "d": 60}, capacity=95)
    assert compact(pool) == [("b", 0), ("d", 20)]
    assert pool.largest_hole == pool.num_free_elements == 15


def test_nothing_is_moved_for_nothing() -> None:
    assert compact(make_pool({"a": 10, "b": 10})) == []
    assert compact(make_pool({"A": 10, "b": 10}, capacity=20)) == []  # one hole, wherever it is


def test_what_is_used_pinned_or_copied_stays_and_the_rest_goes_around_it() -> None:
    pool = make_pool({"A": 10, "b": 15, "C": 10, "d": 15, "e": 15, "f": 10}, capacity=80)
    pool.acquire(digest_of("b"))
    entry_of(pool, "d").pinned = True
    pool.remove(entry_of(pool, "f"))
    copying = pool.reserve(digest_of("f"), 12)
    assert copying is not None
    assert next_move([entry for entry in pool.entries() if entry.digest[-1] != "e"], pool._arena) is None
    assert compact(pool) == []  # e, the only one that may, fits into no hole
    with pytest.raises(AssertionError, match="in use, pinned or being copied"):
        pool.begin_move(Move(entry_of(pool, "b"), 0))


@pytest.mark.parametrize("seed", range(40))
def test_whatever_was_left_by_churn_becomes_one_range_within_two_passes(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {f"{index}{'X' if rng.random() < 0.4 else 'x'}": rng.randint(1, 60) for index in range(40)}
    pool = make_pool(sizes, capacity=sum(sizes.values()) + 10)
    used = pool.capacity_elements - pool.num_free_elements
    moved = 0
    while (move := pool.next_move()) is not None:
        moved += move.entry.num_elements
        pool.begin_move(move)
        pool.end_move(move.entry)
    assert pool.largest_hole == pool.num_free_elements
    assert moved <= 2 * used


def test_a_moving_adapter_is_on_its_way_and_nothing_else_takes_either_place() -> None:
    pool = make_pool({"A": 10, "b": 10, "C": 10, "d": 10}, capacity=40)
    move = pool.next_move()
    assert move is not None
    pool.begin_move(move)
    assert pool.acquire(digest_of("d")) is None
    assert (entry_of(pool, "d").state, pool.is_moving(digest_of("d"))) == (EntryState.MOVING, True)
    assert pool.num_free_elements == 10  # the other hole
    assert pool.reserve(digest_of("e"), 11, keep={digest_of("b")}) is None
    pool.end_move(move.entry)
    assert pool.acquire(digest_of("d")) is not None
    assert pool.num_free_elements == 20


def fragmented() -> Bench:
    """A device of 40 elements with b and d on it, 10 elements each, and two holes of 10."""
    bench = make_bench()
    bench.bring(A, B, C, D)
    bench.tiers.forget(A)
    bench.tiers.forget(C)
    bench.disk.sizes[E] = 20
    bench.tiers.poll()
    return bench


def test_an_adapter_that_fits_the_free_bytes_evicts_nobody_once_the_engine_was_idle() -> None:
    at_once, later = fragmented(), fragmented()
    later.tidy()
    for bench in (at_once, later):
        bench.bring(E)
    assert at_once.resident() in ({B, E}, {D, E})
    assert later.resident() == {B, D, E}
    assert (later.tiers.stats().evictions, later.tiers.stats().moves) == (0, 1)
    for digest in (B, D, E):
        slot = later.tiers.acquire(digest)
        assert slot is not None
        assert later.device.read(slot) == 1 + ord(digest[-1])


def test_free_memory_tells_how_much_of_it_lies_together() -> None:
    bench = fragmented()
    assert bench.tiers.stats().largest_free_ratio == 0.5
    bench.tidy()
    assert bench.tiers.stats().largest_free_ratio == 1.0
    bench.bring(E)
    assert bench.tiers.stats().largest_free_ratio == 1.0  # nothing is free


def test_nothing_moves_until_nobody_has_used_an_adapter_for_a_while() -> None:
    bench = fragmented()
    bench.clock.advance(1)
    bench.tiers.acquire(B)
    bench.tiers.release(B)
    bench.tiers.tidy()
    assert bench.device.num_moved == 0
    assert bench.tiers.poll_due_s == pytest.approx(0.05)
    bench.clock.advance(0.04)
    bench.tiers.tidy()
    assert bench.device.num_moved == 0
    assert bench.tiers.poll_due_s == pytest.approx(0.01)
    bench.clock.advance(0.02)
    bench.tiers.tidy()
    assert bench.device.num_moved == 10


def test_nothing_moves_while_anything_is_wanted_or_under_way() -> None:
    bench = fragmented()
    bench.clock.advance(1)
    bench.delay[0] = 3
    bench.tiers.want([A])
    bench.tiers.tidy()
    bench.host.load_next()
    bench.tiers.poll()
    bench.tiers.want([])
    bench.tiers.tidy()  # a's copy is under way
    assert bench.device.num_moved == 0
    bench.settle()
    bench.tiers.forget(A)
    bench.tiers.tidy()
    bench.tiers.tidy()  # one at a time
    assert bench.device.num_moved == 10


def test_who_wants_the_moving_adapter_gets_it_where_it_has_gone_and_that_is_no_miss() -> None:
    bench = fragmented()
    bench.clock.advance(1)
    bench.delay[0] = 2
    bench.tiers.tidy()
    misses = bench.tiers.stats().misses
    activations = bench.tiers.num_activations
    assert bench.tiers.want([B, D]) == {}
    assert bench.tiers.acquire(D) is None
    assert bench.tiers.acquire(B) is not None  # others do not wait
    assert bench.tiers.poll_due_s is not None
    bench.settle()
    slot = bench.tiers.acquire(D)
    assert slot is not None
    assert bench.device.read(slot) == 1 + ord("d")
    assert bench.tiers.num_activations == activations + 1, "or the scheduler would not look again"
    assert (bench.tiers.stats().misses, bench.tiers.stats().activations) == (misses, 4)


@pytest.mark.parametrize("change", ["forget", "pin"])
def test_a_moving_adapter_may_be_deleted_or_pinned(change: str) -> None:
    bench = fragmented()
    bench.clock.advance(1)
    bench.delay[0] = 2
    bench.tiers.tidy()
    getattr(bench.tiers, change)(D)
    bench.tidy()
    assert (D in bench.resident()) == (change == "pin")
    assert bench.tiers.stats().largest_free_ratio == 1.0
