"""Pieces never overlap, holes always merge, nothing gets lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.tiers.arena_allocator import ArenaAllocator


def holes_of(arena: ArenaAllocator) -> list[tuple[int, int]]:
    """(offset, size) of every hole, in order."""
    return list(zip(arena._hole_starts, arena._hole_sizes, strict=True))


@given(
    alignment=st.sampled_from([1, 4, 32]),
    actions=st.lists(st.tuples(st.booleans(), st.integers(1, 200), st.integers(0, 30)), max_size=80),
)
def test_pieces_stay_apart_and_holes_are_exactly_the_rest(alignment: int, actions: list[tuple[bool, int, int]]) -> None:
    arena = ArenaAllocator(700, alignment)
    pieces: list[tuple[int, int]] = []
    for is_free, size, which in actions:
        if is_free and pieces:
            arena.free(pieces.pop(which % len(pieces))[0])
        else:
            fitted = arena.fits(size)
            offset = arena.allocate(size)
            assert fitted == (offset is not None)
            if offset is not None:
                assert offset % alignment == 0
                pieces.append((offset, arena.rounded(size)))
        regions = sorted([*pieces, *holes_of(arena)])
        assert [start for start, _ in regions] == [0, *(start + size for start, size in regions)][:-1]
        assert sum(size for _, size in regions) == arena.capacity
        holes = holes_of(arena)
        assert all(a[0] + a[1] < b[0] for a, b in pairwise(holes)), "two holes touch"
        assert arena.largest_hole == max((size for _, size in holes), default=0)
        assert arena.num_free == sum(size for _, size in holes)


def test_the_smallest_sufficient_hole_is_taken_and_the_first_among_equals() -> None:
    arena = ArenaAllocator(100)
    offsets = [arena.allocate(size) for size in (30, 5, 10, 5, 10, 5)]
    assert offsets == [0, 30, 35, 45, 50, 60]
    for offset in (0, 35, 50):
        arena.free(offset)
    assert holes_of(arena) == [(0, 30), (35, 10), (50, 10), (65, 35)]
    assert [arena.allocate(9), arena.allocate(10), arena.allocate(31), arena.allocate(31)] == [35, 50, 65, None]


def test_a_copy_is_independent() -> None:
    arena = ArenaAllocator(10)
    arena.allocate(4)
    twin = arena.copy()
    twin.free(0)
    assert (twin.largest_hole, arena.largest_hole) == (10, 6)


def test_capacity_is_cut_to_the_alignment() -> None:
    assert ArenaAllocator(70, 32).capacity == 64
    with pytest.raises(ValueError, match=r"capacity .* \(32 elements\), got 31"):
        ArenaAllocator(31, 32)


def test_freeing_what_is_not_there_is_caught() -> None:
    arena = ArenaAllocator(10)
    arena.allocate(4)
    arena.free(0)
    with pytest.raises(AssertionError, match="nothing is allocated at 0"):
        arena.free(0)
