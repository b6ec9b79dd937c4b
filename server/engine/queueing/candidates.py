"""One look through the queues: waiting requests in the order they may be admitted. Decides who is held back meanwhile;
the order itself is `fair_share`'s between tenants and `tenant_queue`'s within one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from adapters_store.base.description import AdapterDigest
from server.engine.queueing.fair_share import INPUT_COST, FairShare, TenantAccount
from server.engine.queueing.tenant_queue import Filter, TenantWalk
from server.engine.request import Request

OpenTenant = Callable[[TenantAccount, Collection[AdapterDigest], Filter | None], TenantWalk | None]


class Starving(NamedTuple):
    """The most urgent request whose adapter has found no room on the device for too long.

    tenant: where it is only this tenant's own requests that must make room, because it has used up its share.
    """

    place: int
    adapter: AdapterDigest
    tenant: str | None = None


class Walk:
    """Waiting requests in the order they may be admitted, one candidate at a time. The queue must not change meanwhile.

    While somebody starves, those behind it that use another adapter are left out, even an adapter that runs already:
    each of them would keep bytes in use that the starving one needs. Those before it, and requests of the bare base,
    go on.
    """

    def __init__(
        self,
        shares: FairShare,
        open_tenant: OpenTenant,
        ready: Collection[AdapterDigest],
        starving: Starving | None,
        crowding: Collection[str],
    ) -> None:
        self._shares = shares
        self._open_tenant = open_tenant
        self._ready = ready
        self._starving = starving
        self._crowding = crowding
        self._open: dict[str, TenantWalk] = {}
        self._exhausted: list[TenantAccount] = []

    @property
    def account(self) -> TenantAccount | None:
        """Whose turn it may be, nothing of its queue having been looked at; None at the end."""
        return self._shares.lowest()

    @property
    def current(self) -> Request | None:
        """Whose turn it is; None at the end."""
        while (account := self.account) is not None:
            request = self.current_of(account)
            if request is not None:
                return request
        return None

    def current_of(self, account: TenantAccount) -> Request | None:
        """The request of `account`, whose turn it may be; None if it has none (more), and it is the next one's turn."""
        shares = self._shares
        walk = self._open.get(account.tenant)
        if walk is None:
            walk = self._open_tenant(account, self._ready, self._filter(account.tenant))
            if walk is None:
                shares.withdraw_lowest()
                return None
            self._open[account.tenant] = walk
        while (request := walk.current) is not None and self._has_left(request.adapter):
            walk.advance()
        if request is None:
            shares.withdraw_lowest()
            self._exhausted.append(account)
        return request

    def _has_left(self, adapter: AdapterDigest | None) -> bool:
        """Since the walk began: it had been deleted, and its last user was put out for somebody admitted since."""
        return adapter is not None and adapter not in self._ready

    def advance(self, *, admitted: bool) -> None:
        """Done with the current request. An admitted one is paid for, so that another tenant may be next."""
        request = self.current
        assert request is not None, "advanced beyond the end"
        account = self._shares.account(request.tenant)
        self._open[request.tenant].advance()
        if admitted:
            self._shares.picked(account, prompt_cost(request))

    def skip_tenant(self) -> None:
        """None of the requests of the tenant whose turn it is (`account`, or `current`) in this walk."""
        self._exhausted.append(self._shares.withdraw_lowest())

    def close(self) -> None:
        """Those who had nothing more may be picked in the next walk."""
        for account in self._exhausted:
            self._shares.offer(account)

    def _filter(self, tenant: str) -> Filter | None:
        if tenant in self._crowding:
            return lambda place, adapter: True
        starving = self._starving
        if starving is None or (starving.tenant is not None and starving.tenant != tenant):
            return None
        return lambda place, adapter: place > starving.place and adapter != starving.adapter


def prompt_cost(request: Request) -> float:
    """Virtual tokens of the prompt, without what the prefix cache gave; nothing when it is computed once more."""
    if request.first_scheduled_s is not None:
        return 0.0
    return INPUT_COST * request.price * max(0, len(request.prompt_ids) - request.num_computed_tokens)
