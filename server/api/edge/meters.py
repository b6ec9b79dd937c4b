"""The seam between a request and its tenant's quotas: counted in this process, or together with other servers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from adapters_store.accounts.records import Quotas
from server.api.edge.rate_limits import Admission, RateLimits


class Admitted(Protocol):
    """One request, taken before its body was read."""

    def undo(self) -> None:
        """Give it back. A second call does nothing."""


class Held(Protocol):
    """What a call holds until it is over."""

    @property
    def headers(self) -> Mapping[str, str]:
        """x-ratelimit-*, as they are after it."""

    def settle(self, num_used_tokens: int) -> None:
        """Give back what was reserved and not used. A second call does nothing."""


class Meters(Protocol):
    """Used on the event loop only."""

    async def admit(self, tenant: str, quotas: Quotas) -> Admitted:
        """Take one request, if the quota allows the smallest one. Raises ApiError 429 as `reserve` does."""

    async def reserve(
        self, tenant: str, quotas: Quotas, admitted: Admitted | None, *, num_tokens: int, num_sequences: int
    ) -> Held:
        """Take one request (the admitted one, if there is), its tokens and its sequences; all or nothing.

        Raises ApiError 429: request_exceeds_quota (never repeat it), concurrency_limit, requests_per_minute or
        tokens_per_minute (with when to come back). An admitted request is then given back.
        """


class LocalMeters:
    """One server's own."""

    def __init__(self) -> None:
        self._limits = RateLimits()

    async def admit(self, tenant: str, quotas: Quotas) -> Admission:
        return self._limits.admit(tenant, quotas)

    async def reserve(
        self, tenant: str, quotas: Quotas, admitted: Admitted | None, *, num_tokens: int, num_sequences: int
    ) -> Held:
        if admitted is not None:
            admitted.undo()
        return self._limits.reserve(tenant, quotas, num_tokens=num_tokens, num_sequences=num_sequences)
