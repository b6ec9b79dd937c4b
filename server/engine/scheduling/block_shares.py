"""Decides whose requests give up their KV blocks for one that finds none. Knows who runs, what they hold and tenants'
weights; knows no queue, no adapters and no places.

As with places, blocks change hands only where whoever gives them up still holds no less afterwards, for its weight,
than whoever gets them, so none goes to and fro. But what is given up is computed again, so only a tenant that holds
more than twice its part of all blocks has to: chance alone would else keep tenants busy with it that all want more.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.queueing.fair_share import FairShare
from server.engine.request import Request
from server.engine.scheduling.block_pool import BlockPool
from server.engine.scheduling.preemption import is_movable

_SLACK = 2.0


class BlockShares:
    """One scheduler's."""

    def __init__(self, pool: BlockPool, shares: FairShare) -> None:
        self._pool = pool
        self._shares = shares
        self._last_in_vain: tuple[str, int] | None = None

    def who_makes_room(
        self, newcomer: Request, running: Sequence[Request], *, num_spare: int, num_changes: int, now_s: float
    ) -> list[Request]:
        """The last admitted of the tenant that holds most, as few as free the blocks it misses; nobody, if that cannot
        be. num_spare: as `BlockPool.admit` takes it.

        num_changes: rises with everybody who begins or stops running. Until it does, what was in vain is not tried
        again.
        """
        if self._last_in_vain == (newcomer.id, num_changes):
            return []
        victims = self._look(newcomer, running, num_spare, now_s)
        self._last_in_vain = None if victims else (newcomer.id, num_changes)
        return victims

    def _look(self, newcomer: Request, running: Sequence[Request], num_spare: int, now_s: float) -> list[Request]:
        held: dict[str, int] = {}
        for request in running:
            held[request.tenant] = held.get(request.tenant, 0) + len(request.block_ids)
        level = {tenant: count / self._weight_of(tenant) for tenant, count in held.items()}
        fullest = max(level, key=level.__getitem__, default=newcomer.tenant)
        if fullest == newcomer.tenant or held[fullest] <= _SLACK * self._part_of(fullest, now_s):
            return []
        num_wanted = self._pool.blocks_for(newcomer.num_tokens)
        least = self._weight_of(fullest) * (held.get(newcomer.tenant, 0) + num_wanted) / newcomer.weight
        num_missing = self._pool.num_missing(newcomer, self._pool.match(newcomer), num_spare=num_spare)
        victims: list[Request] = []
        for request in reversed(running):
            if request.tenant != fullest or not is_movable(request):
                continue
            held[fullest] -= len(request.block_ids)
            if held[fullest] < least:
                break
            victims.append(request)
            num_missing -= sum(self._pool.ref_count(block_id) == 1 for block_id in request.block_ids)
            if num_missing <= 0:
                return victims
        return []

    def _part_of(self, tenant: str, now_s: float) -> float:
        """Of all blocks."""
        return self._pool.num_blocks * self._shares.share_of(self._shares.account(tenant), now_s)

    def _weight_of(self, tenant: str) -> float:
        return self._shares.account(tenant).weight
