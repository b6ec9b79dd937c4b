"""Decides which tenant may take a running slot or KV blocks, and which request is preempted for it. Knows running
requests, their blocks and tenants' accounts; knows no queue order, no adapters and no tokens.

Slots and blocks are shared between tenants by what each holds now for its weight. They change hands only if the tenant
that gives them up still holds no less afterwards than the tenant that gets them. So only tenants above their share give
any up, and no request is preempted to and fro (no thrashing).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set

from server.engine.queueing.fair_share import FairShare, TenantAccount
from server.engine.request import Request, Status
from server.engine.schedule import SchedulerSettings
from server.engine.scheduling.block_pool import BlockPool

_MAX_PREEMPTIONS = 4  # of one request for fairness: then it keeps its slot to the end
_BLOCK_SLACK = 2.0  # times its share of all blocks


class RunningSlots:
    """The `max_running` slots of a forward, and how many each tenant uses."""

    def __init__(self, settings: SchedulerSettings, shares: FairShare) -> None:
        self._max_running = settings.running_slots
        self._num_reserved = int(settings.reserved * settings.running_slots)
        self._shares = shares
        self._holders: dict[str, TenantAccount] = {}  # tenants that run something
        self._top: TenantAccount | None = None  # of those, the one that runs most for its weight; None: not known
        self._top_weight_changes = 0  # `FairShare.num_weight_changes` when it was found
        self.num_changes = 0  # rises whenever a slot is taken or given up
        self._last_pass: tuple[int, int, int] | None = None

    def enter(self, request: Request) -> None:
        """The request takes a slot."""
        account = self._shares.account(request.tenant)
        account.num_running += 1
        self.num_changes += 1
        self._holders[request.tenant] = account
        if self._top is not None and _level(account) > _level(self._top):
            self._top = account

    def leave(self, request: Request) -> None:
        """The request gives up its slot."""
        account = self._holders[request.tenant]
        account.num_running -= 1
        self.num_changes += 1
        if account is self._top:
            self._top = None
        if not account.num_running:
            del self._holders[request.tenant]

    def share_of(self, account: TenantAccount, now_s: float) -> float:
        """How many slots are the tenant's share."""
        return self._max_running * self._shares.share_of(account, now_s)

    def is_reserved_from(self, account: TenantAccount, num_running: int, noisy: Set[str], now_s: float) -> bool:
        """Whether the last slots are kept from this tenant: it has its share and would run most. Otherwise a noisy
        tenant would fill them. They are not kept from the neighbours of a noisy tenant, which has slots to give up."""
        if noisy and account.tenant not in noisy:
            return False
        if num_running < self._max_running - self._num_reserved or not self._holders:
            return False
        if account.num_running < self.share_of(account, now_s):
            return False
        return (account.num_running + 1) / account.weight > _level(self._fullest())

    def may_admit(self, num_running: int, num_arrivals: int, num_activations: int, *, has_blocks: bool) -> bool:
        """Whether a slot with blocks is free or could change hands. If no request came or went since the last pass, and
        no adapter became ready, another pass would find nothing again."""
        if num_running < self._max_running and has_blocks:
            return True
        if not num_running:
            return False
        state = (self.num_changes, num_arrivals, num_activations)
        is_new, self._last_pass = state != self._last_pass, state
        return is_new and self._fullest().num_running > 1  # a tenant's only running request keeps its slot

    def victim_for(
        self, account: TenantAccount, running: Sequence[Request], noisy: Set[str], now_s: float
    ) -> Request | None:
        """The request whose slot this tenant may take, if any.

        First choice: the last admitted request of a noisy tenant that runs more than its share. Else that of the tenant
        that runs most for its weight, unless it would then run less than this one. A noisy tenant that runs its share
        takes no slot from tenants that are not noisy.
        """
        is_noisy = account.tenant in noisy
        if noisy and not is_noisy:
            over = [holder for holder in self._holders.values() if self._is_over_share(holder, noisy, now_s)]
            for holder in sorted(over, key=_level, reverse=True):
                if (victim := _last_of(holder, running)) is not None:
                    return victim
        fullest = self._fullest()
        if (fullest.num_running - 1) / fullest.weight < (account.num_running + 1) / account.weight:
            return None
        if is_noisy and fullest.tenant not in noisy and account.num_running + 1 > self.share_of(account, now_s):
            return None
        return _last_of(fullest, running)

    def _is_over_share(self, account: TenantAccount, noisy: Set[str], now_s: float) -> bool:
        return account.tenant in noisy and account.num_running - 1 >= self.share_of(account, now_s)

    def last_of_fullest(self, running: Sequence[Request]) -> Request:
        """The request to preempt when blocks run out: the last admitted of the tenant that runs most for its weight.
        Never the first admitted of all, so that some request always finishes."""
        return max(enumerate(running[1:]), key=lambda entry: (_level(self._holders[entry[1].tenant]), entry[0]))[1]

    def holders(self) -> Collection[TenantAccount]:
        """Tenants that run something."""
        return self._holders.values()

    def _fullest(self) -> TenantAccount:
        num_weight_changes = self._shares.num_weight_changes
        if self._top is None or self._top_weight_changes != num_weight_changes:
            self._top_weight_changes = num_weight_changes
            self._top = max(self._holders.values(), key=_level)
        return self._top


class BlockPreemption:
    """Chooses the requests to preempt for one that finds too few KV blocks.

    A preempted request is computed again. So only a tenant that holds more than twice its share of all blocks gives any
    up: otherwise chance alone would keep tenants preempting each other.
    """

    def __init__(self, pool: BlockPool, shares: FairShare) -> None:
        self._pool = pool
        self._shares = shares
        self._last_failure: tuple[str, int] | None = None

    def victims_for(
        self, newcomer: Request, running: Sequence[Request], *, num_spare: int, num_changes: int, now_s: float
    ) -> list[Request]:
        """The last admitted requests of the tenant that holds most, as few as free the missing blocks; empty if that is
        impossible. num_spare: as in `BlockPool.admit`.

        num_changes: rises whenever a request begins or stops running. Until it does, a failed search is not repeated.
        """
        if self._last_failure == (newcomer.id, num_changes):
            return []
        victims = self._search(newcomer, running, num_spare, now_s)
        self._last_failure = None if victims else (newcomer.id, num_changes)
        return victims

    def _search(self, newcomer: Request, running: Sequence[Request], num_spare: int, now_s: float) -> list[Request]:
        held: dict[str, int] = {}
        for request in running:
            held[request.tenant] = held.get(request.tenant, 0) + len(request.block_ids)
        level = {tenant: count / self._weight_of(tenant) for tenant, count in held.items()}
        fullest = max(level, key=level.__getitem__, default=newcomer.tenant)
        if fullest == newcomer.tenant or held[fullest] <= _BLOCK_SLACK * self._share_of(fullest, now_s):
            return []
        num_wanted = self._pool.blocks_for(newcomer.num_tokens)
        least = self._weight_of(fullest) * (held.get(newcomer.tenant, 0) + num_wanted) / newcomer.weight
        num_missing = self._pool.num_missing(newcomer, self._pool.match(newcomer), num_spare=num_spare)
        victims: list[Request] = []
        for request in reversed(running):
            if request.tenant != fullest or not is_preemptible(request):
                continue
            held[fullest] -= len(request.block_ids)
            if held[fullest] < least:
                break
            victims.append(request)
            num_missing -= sum(self._pool.ref_count(block_id) == 1 for block_id in request.block_ids)
            if num_missing <= 0:
                return victims
        return []

    def _share_of(self, tenant: str, now_s: float) -> float:
        """Blocks."""
        return self._pool.num_blocks * self._shares.share_of(self._shares.account(tenant), now_s)

    def _weight_of(self, tenant: str) -> float:
        return self._shares.account(tenant).weight


def _last_of(account: TenantAccount, running: Sequence[Request]) -> Request | None:
    """The last admitted of this tenant's requests that may be preempted."""
    for request in reversed(running):
        if request.tenant == account.tenant and is_preemptible(request):
            return request
    return None


def is_preemptible(request: Request) -> bool:
    """Whether it may be preempted once more for another tenant's request."""
    return request.status is Status.RUNNING and request.num_preemptions < _MAX_PREEMPTIONS


def _level(account: TenantAccount) -> float:
    return account.num_running / account.weight
