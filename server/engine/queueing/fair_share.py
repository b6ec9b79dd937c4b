"""Decides whose turn it is: virtual-token counters per tenant. Knows tenants, weights and counts; knows no queue order,
no blocks and no adapters.

The Virtual Token Counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): a tenant's counter
rises with what it is given, an input token costing 1 and an output token 2, divided by its weight, and the lowest
counter is served next. A tenant that begins to wait is lifted to the lowest counter of those who wait, so that nobody
saves up turns by being idle, and nobody pays for having been alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace

INPUT_COST = 1.0
OUTPUT_COST = 2.0
_SWEEP_EVERY = 1024
_LOOK_EVERY_S = 0.5
_ACTIVE_S = 10.0


@dataclass(slots=True, eq=False)
class TenantAccount:
    """service: virtual tokens given so far, divided by the weight, with all lifts. lifted: the lifts alone.

    load: adapter elements brought to the device for it, divided by the weight, with lifts.
    num_waiting, num_running: its requests in the scheduler now. in_heap: whether it can be picked. seen_service,
    active_until_s: whether it has been served lately.
    """

    tenant: str
    weight: float = 1.0
    service: float = 0.0
    lifted: float = 0.0
    load: float = 0.0
    num_waiting: int = 0
    num_running: int = 0
    in_heap: bool = False
    seen_service: float = -1.0
    active_until_s: float = 0.0

    @property
    def served(self) -> float:
        """Virtual tokens per unit of weight that the tenant has really been given."""
        return self.service - self.lifted

    def charge(self, cost: float) -> None:
        """cost: virtual tokens."""
        self.service += cost / self.weight


class FairShare:
    """Every tenant's account, and which of those that wait has been given least.

    Counters only rise, so the heap may hold old ones: an entry whose counter has risen since is put back when it comes
    to the top. Nothing is sorted, and a tenant that is served without being picked costs nothing.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, TenantAccount] = {}
        self._heap: list[tuple[float, int, TenantAccount]] = []
        self._num_entries = 0  # breaks ties by age of the entry
        self._virtual_time = 0.0  # the counter of whoever was picked last: what an idle tenant is lifted to
        self._sweep_at = _SWEEP_EVERY
        self._active_weight = 0.0
        self._look_due_s = float("-inf")

    def account(self, tenant: str) -> TenantAccount:
        """The tenant's account, opened if need be."""
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= self._sweep_at:
                self._sweep()
            account = self._accounts[tenant] = TenantAccount(tenant)
        return account

    def accounts(self) -> Iterable[TenantAccount]:
        return self._accounts.values()

    def begin_waiting(self, account: TenantAccount) -> None:
        """Its first request begins to wait: lift its counter."""
        floor = self._virtual_time if (lowest := self.lowest()) is None else max(lowest.service, self._virtual_time)
        if account.service < floor:
            account.lifted += floor - account.service
            account.service = floor

    def offer(self, account: TenantAccount) -> None:
        """The account may be picked from now on."""
        if not account.in_heap:
            account.in_heap = True
            self._num_entries += 1
            heappush(self._heap, (account.service, self._num_entries, account))

    def lowest(self) -> TenantAccount | None:
        """Whoever waits and has been given least."""
        heap = self._heap
        while heap:
            service, entry, account = heap[0]
            if not account.num_waiting:
                self.withdraw_lowest()
            elif service < account.service:
                heapreplace(heap, (account.service, entry, account))
            else:
                return account
        return None

    def withdraw_lowest(self) -> TenantAccount:
        """The lowest account, which is out until it is offered again. To be called after `lowest`."""
        account = heappop(self._heap)[2]
        account.in_heap = False
        return account

    def picked(self, account: TenantAccount, cost: float) -> None:
        """A request of this account is admitted, at this cost in virtual tokens."""
        self._virtual_time = max(self._virtual_time, account.service)
        account.charge(cost)

    def share_of(self, account: TenantAccount, now_s: float) -> float:
        """The tenant's part of the whole among those that have been active in the last seconds, 0..1."""
        if now_s >= self._look_due_s:
            self._look_due_s = now_s + _LOOK_EVERY_S
            self._look(now_s)
        return account.weight / max(account.weight, self._active_weight)

    def _look(self, now_s: float) -> None:
        self._active_weight = 0.0
        for account in self._accounts.values():
            if account.num_waiting or account.num_running or account.service != account.seen_service:
                account.active_until_s = now_s + _ACTIVE_S
            account.seen_service = account.service
            if account.active_until_s > now_s:
                self._active_weight += account.weight

    def _sweep(self) -> None:
        """Close accounts that are idle and owe nothing: opened anew they would be lifted to the same counter."""
        self._accounts = {
            tenant: account
            for tenant, account in self._accounts.items()
            if account.num_waiting or account.num_running or account.in_heap or account.service > self._virtual_time
        }
        self._sweep_at = max(_SWEEP_EVERY, 2 * len(self._accounts))


def jain_index(shares: Iterable[float]) -> float:
    """(sum x)^2 / (n sum x^2): 1 where all are equal, 1/n where one has everything (Jain, Chiu, Hawe 1984)."""
    values = list(shares)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares > 0.0 else 1.0
