"""Checks a block pool against the requests that hold its blocks."""

from __future__ import annotations

from collections.abc import Iterable

from server.engine.scheduling.block_pool import BlockPool


def check_blocks(pool: BlockPool, owners: Iterable[list[int]]) -> None:
    """Assert that reference counts equal the owners' claims and that the rest is free."""
    claims = [0] * pool.num_blocks
    for block_ids in owners:
        for block_id in block_ids:
            claims[block_id] += 1
    assert claims == pool._ref_counts, "reference counts differ from owners"
    assert sum(count == 0 for count in claims) == len(pool._free), "a block leaked or is owned twice"
    assert all(claims[block_id] == 0 for block_id in pool._free), "an owned block is on the free list"
