"""How evenly tenants that had to wait were served lately. Knows accounts and moments; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable

from server.engine.queueing.fair_share import TenantAccount, jain_index


class FairnessGauge:
    """Jain's index over windows: of what each tenant was given for its weight, if it waited at both ends of the window.
    Those that did not wait got all they wanted, and say nothing about fairness. 1 where fewer than two waited."""

    def __init__(self, window_s: float = 10.0) -> None:
        self.value = 1.0
        self._window_s = window_s
        self._end_s = float("-inf")
        self._at_start: dict[str, float] = {}

    def read(self, accounts: Iterable[TenantAccount], now_s: float) -> float:
        """The index of the last whole window."""
        if now_s < self._end_s:
            return self.value
        waiting = {account.tenant: account.served for account in accounts if account.num_waiting}
        given = [served - self._at_start[tenant] for tenant, served in waiting.items() if tenant in self._at_start]
        self.value = jain_index(given) if len(given) > 1 else 1.0
        self._at_start, self._end_s = waiting, now_s + self._window_s
        return self.value
