"""Decides which tenant is served next: virtual-token counters per tenant. Knows tenants, weights and counts; knows no
queue order, no blocks and no adapters.

The Virtual Token Counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): a tenant's counter
rises with what it is given, an input token costing 1 and an output token 2, divided by its weight, and the lowest
counter is served next. A tenant that begins to wait is lifted to the lowest counter of the waiting tenants. So no
tenant saves up service while idle, and none pays for having been alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace

INPUT_COST = 1.0
OUTPUT_COST = 2.0
_SWEEP_EVERY = 1024
_REFRESH_EVERY_S = 0.5
_ACTIVE_S = 10.0


@dataclass(slots=True, eq=False)
class TenantAccount:
    """service: virtual tokens given so far, divided by the weight, plus all lifts. lifted: the lifts alone.

    load: adapter elements brought to the device for it, divided by the weight, with lifts.
    num_waiting, num_running: its requests in the scheduler. in_heap: whether it can be picked. seen_service,
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
        """Virtual tokens per unit of weight that the tenant was really given."""
        return self.service - self.lifted

    def charge(self, cost: float) -> None:
        """cost: virtual tokens."""
        self.service += cost / self.weight


class FairShare:
    """Every tenant's account, and which waiting tenant is the least served.

    Counters only rise, so the heap may hold old ones: an entry whose counter has risen since is put back when it comes
    to the top. Nothing is sorted, and a tenant that is served without being picked costs nothing.
    """

    def __init__(self) -> None:
        self.num_weight_changes = 0  # rises whenever a tenant's weight changes
        self._accounts: dict[str, TenantAccount] = {}
        self._heap: list[tuple[float, int, TenantAccount]] = []
        self._num_entries = 0  # breaks ties by age of the entry
        self._virtual_time = 0.0  # the counter of the tenant picked last: what an idle tenant is lifted to
        self._sweep_at = _SWEEP_EVERY
        self._active_weight = 0.0
        self._refresh_due_s = float("-inf")

    def account(self, tenant: str) -> TenantAccount:
        """The tenant's account, created if missing."""
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= self._sweep_at:
                self._sweep()
            account = self._accounts[tenant] = TenantAccount(tenant)
        return account

    def accounts(self) -> Iterable[TenantAccount]:
        return self._accounts.values()

    def set_weight(self, account: TenantAccount, weight: float) -> None:
        """From now on. What it was given before stays divided by the weight that it had then."""
        if account.weight != weight:
            account.weight = weight
            self.num_weight_changes += 1

    def begin_waiting(self, account: TenantAccount) -> None:
        """Lift the tenant's counter: its first request begins to wait."""
        floor = self._virtual_time if (lowest := self.lowest()) is None else max(lowest.service, self._virtual_time)
        if account.service < floor:
            account.lifted += floor - account.service
            account.service = floor

    def offer(self, account: TenantAccount) -> None:
        """Let the account be picked."""
        if not account.in_heap:
            account.in_heap = True
            self._num_entries += 1
            heappush(self._heap, (account.service, self._num_entries, account))

    def lowest(self) -> TenantAccount | None:
        """The least served waiting tenant; None if no tenant waits."""
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
        """Take the lowest account out until it is offered again. Call it after `lowest`."""
        account = heappop(self._heap)[2]
        account.in_heap = False
        return account

    def picked(self, account: TenantAccount, cost: float) -> None:
        """A request of this account is admitted. cost: virtual tokens."""
        self._virtual_time = max(self._virtual_time, account.service)
        account.charge(cost)

    def share_of(self, account: TenantAccount, now_s: float) -> float:
        """The tenant's share of the server among tenants active in the last seconds, 0..1."""
        if now_s >= self._refresh_due_s:
            self._refresh_due_s = now_s + _REFRESH_EVERY_S
            self._refresh_active(now_s)
        return account.weight / max(account.weight, self._active_weight)

    def _refresh_active(self, now_s: float) -> None:
        self._active_weight = 0.0
        for account in self._accounts.values():
            if account.num_waiting or account.num_running or account.service != account.seen_service:
                account.active_until_s = now_s + _ACTIVE_S
            account.seen_service = account.service
            if account.active_until_s > now_s:
                self._active_weight += account.weight

    def _sweep(self) -> None:
        """Delete accounts that are idle and owe nothing: a new account would be lifted to the same counter."""
        self._accounts = {
            tenant: account
            for tenant, account in self._accounts.items()
            if account.num_waiting or account.num_running or account.in_heap or account.service > self._virtual_time
        }
        self._sweep_at = max(_SWEEP_EVERY, 2 * len(self._accounts))


def jain_index(shares: Iterable[float]) -> float:
    """(sum x)^2 / (n sum x^2): 1 if all are equal, 1/n if one has everything (Jain, Chiu, Hawe 1984)."""
    values = list(shares)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares > 0.0 else 1.0
