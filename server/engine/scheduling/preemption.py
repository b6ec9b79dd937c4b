"""Decides who may take a place in the batch, and who gives one up. Knows running requests and tenants' accounts; knows
no queue order, no adapters and no tokens.

Between tenants, places are shared by what each runs now for its weight. A place changes hands only where whoever gives
it up still runs no less afterwards than whoever takes it. So only tenants above their part give any up, and no place
goes to and fro.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set

from server.engine.queueing.fair_share import FairShare, TenantAccount
from server.engine.request import Request, Status
from server.engine.schedule import SchedulerSettings
from server.engine.scheduling.block_pool import BlockPool

_BLOCK_SLACK = 2.0  # times its part of all blocks
_MAX_PREEMPTIONS = 4  # of one request: then it keeps its place to the end, as far as fairness goes


class Places:
    """The `max_running` places of a forward, and what each tenant has of them."""

    def __init__(self, settings: SchedulerSettings, shares: FairShare) -> None:
        self._max_running = settings.max_running
        self._num_reserved = int(settings.reserved * settings.max_running)
        self._shares = shares
        self._holders: dict[str, TenantAccount] = {}  # tenants that run something
        self._top: TenantAccount | None = None  # of those, the one that runs most for its weight; None: look again
        self.num_changes = 0  # rises whenever a place is taken or given up
        self._last_look: tuple[int, int, int] | None = None

    def enter(self, request: Request) -> None:
        """The request takes a place."""
        account = self._shares.account(request.tenant)
        account.num_running += 1
        self.num_changes += 1
        self._holders[request.tenant] = account
        if self._top is not None and _level(account) > _level(self._top):
            self._top = account

    def leave(self, request: Request) -> None:
        """The request's place is free."""
        account = self._holders[request.tenant]
        account.num_running -= 1
        self.num_changes += 1
        if account is self._top:
            self._top = None
        if not account.num_running:
            del self._holders[request.tenant]

    def part_of(self, account: TenantAccount, now_s: float) -> float:
        """How many of the places are the tenant's share."""
        return self._max_running * self._shares.share_of(account, now_s)

    def is_reserved_from(self, account: TenantAccount, num_running: int, flooding: Set[str], now_s: float) -> bool:
        """The last places are kept from a tenant that has its part and would run most, or a flood would fill them. They
        are not kept from the others of a tenant that floods: it has places to give up."""
        if flooding and account.tenant not in flooding:
            return False
        if num_running < self._max_running - self._num_reserved or not self._holders:
            return False
        if account.num_running < self.part_of(account, now_s):
            return False
        return (account.num_running + 1) / account.weight > _level(self._fullest())

    def may_open(self, num_running: int, num_arrivals: int, num_activations: int, *, has_blocks: bool) -> bool:
        """Whether a place with blocks is free or could change hands. Where nobody came or went since the last look, and
        no adapter became ready, another look would find nothing again."""
        if num_running < self._max_running and has_blocks:
            return True
        if not num_running:
            return False
        look = (self.num_changes, num_arrivals, num_activations)
        is_new, self._last_look = look != self._last_look, look
        return is_new and self._fullest().num_running > 1  # who runs a single request keeps its place

    def victim_for(
        self, account: TenantAccount, running: Sequence[Request], flooding: Set[str], now_s: float
    ) -> Request | None:
        """Whose place this tenant may have: the last admitted of a tenant that floods and runs more than its part, or
        else of the tenant that runs most for its weight, unless it would then run less than this one. A tenant that
        floods and runs its part takes none from those that do not flood."""
        does_flood = account.tenant in flooding
        if flooding and not does_flood:
            over = [holder for holder in self._holders.values() if self._is_beyond_part(holder, flooding, now_s)]
            for holder in sorted(over, key=_level, reverse=True):
                if (victim := _last_of(holder, running)) is not None:
                    return victim
        fullest = self._fullest()
        if (fullest.num_running - 1) / fullest.weight < (account.num_running + 1) / account.weight:
            return None
        if does_flood and fullest.tenant not in flooding and account.num_running + 1 > self.part_of(account, now_s):
            return None
        return _last_of(fullest, running)

    def _is_beyond_part(self, account: TenantAccount, flooding: Set[str], now_s: float) -> bool:
        return account.tenant in flooding and account.num_running - 1 >= self.part_of(account, now_s)

    def last_of_fullest(self, running: Sequence[Request]) -> Request:
        """Who makes room for blocks: the last admitted of the tenant that runs most for its weight; never the first
        admitted of all, so that somebody always comes to an end."""
        return max(enumerate(running[1:]), key=lambda entry: (_level(self._holders[entry[1].tenant]), entry[0]))[1]

    def holders(self) -> Collection[TenantAccount]:
        """Tenants that run something."""
        return self._holders.values()

    def _fullest(self) -> TenantAccount:
        if self._top is None:
            self._top = max(self._holders.values(), key=_level)
        return self._top


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
        if fullest == newcomer.tenant or held[fullest] <= _BLOCK_SLACK * self._part_of(fullest, now_s):
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


def _last_of(account: TenantAccount, running: Sequence[Request]) -> Request | None:
    """The last admitted of this tenant's requests that may be put out."""
    for request in reversed(running):
        if request.tenant == account.tenant and is_movable(request):
            return request
    return None


def is_movable(request: Request) -> bool:
    """Whether it may be put out for another tenant's once more."""
    return request.status is Status.RUNNING and request.num_preemptions < _MAX_PREEMPTIONS


def _level(account: TenantAccount) -> float:
    return account.num_running / account.weight
