"""One pass through the queues: waiting requests in the order they may be admitted. Decides which requests are held back
meanwhile. The order itself is `fair_share`'s between tenants and `tenant_queue`'s within one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from adapters_store.base.description import AdapterDigest
from server.engine.queueing.fair_share import INPUT_COST, FairShare, TenantAccount
from server.engine.queueing.tenant_queue import IsHeldBack, TenantCandidates
from server.engine.request import Request

OpenTenant = Callable[[TenantAccount, Collection[AdapterDigest], IsHeldBack | None], TenantCandidates | None]


class Starving(NamedTuple):
    """The most urgent request whose adapter has found no room on the device for too long.

    tenant: set if only this tenant's own requests must make room, because it has used up its share.
    """

    position: int
    adapter: AdapterDigest
    tenant: str | None = None


class Candidates:
    """Waiting requests in the order they may be admitted, one at a time. The queue must not change meanwhile.

    While a request starves, later requests that use another adapter are skipped, even if their adapter is resident:
    each of them would keep memory in use that the starving one needs. Earlier requests and those of the base model
    continue.
    """

    def __init__(
        self,
        shares: FairShare,
        open_tenant: OpenTenant,
        ready: Collection[AdapterDigest],
        starving: Starving | None,
        over_share_tenants: Collection[str],
    ) -> None:
        self._shares = shares
        self._open_tenant = open_tenant
        self._ready = ready
        self._starving = starving
        self._over_share_tenants = over_share_tenants
        self._open: dict[str, TenantCandidates] = {}
        self._exhausted: list[TenantAccount] = []

    @property
    def account(self) -> TenantAccount | None:
        """The tenant that may be next, before its queue has been looked at; None at the end."""
        return self._shares.lowest()

    def current_of(self, account: TenantAccount) -> Request | None:
        """The next request of `account`, the tenant that may be next; None if it has no more, and another tenant is."""
        shares = self._shares
        own = self._open.get(account.tenant)
        if own is None:
            own = self._open_tenant(account, self._ready, self._filter(account.tenant))
            if own is None:
                shares.withdraw_lowest()
                return None
            self._open[account.tenant] = own
        while (request := own.current) is not None and self._has_left(request.adapter):
            own.advance()
        if request is None:
            shares.withdraw_lowest()
            self._exhausted.append(account)
        return request

    def _has_left(self, adapter: AdapterDigest | None) -> bool:
        """Whether the adapter left the device during this pass: it was deleted, and its last user was preempted."""
        return adapter is not None and adapter not in self._ready

    def advance(self, account: TenantAccount, *, admitted: Request | None) -> None:
        """Done with the current request of `account`. If admitted, it is charged, so another tenant may be next."""
        self._open[account.tenant].advance()
        if admitted is not None:
            self._shares.picked(account, prompt_cost(admitted))

    def skip_tenant(self) -> None:
        """Skip the tenant of `account` for the rest of this pass."""
        self._exhausted.append(self._shares.withdraw_lowest())

    def close(self) -> None:
        """End the pass: tenants without a further candidate may be picked in the next one."""
        for account in self._exhausted:
            self._shares.offer(account)

    def _filter(self, tenant: str) -> IsHeldBack | None:
        if tenant in self._over_share_tenants:
            return lambda position, adapter: True
        starving = self._starving
        if starving is None or (starving.tenant is not None and starving.tenant != tenant):
            return None
        return lambda position, adapter: position > starving.position and adapter != starving.adapter


def prompt_cost(request: Request) -> float:
    """Virtual tokens of the prompt that the prefix cache did not give; 0 if the prompt is only recomputed."""
    if request.first_scheduled_s is not None:
        return 0.0
    return INPUT_COST * request.price * max(0, len(request.prompt_ids) - request.num_computed_tokens)
