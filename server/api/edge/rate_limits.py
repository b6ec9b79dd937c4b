"""Holds tenants to their quotas: requests and tokens per minute, sequences at once. Takes a clock; knows no HTTP but
its own refusals and headers.

A request takes what it may cost, prompt and max_tokens, and gives back what it did not use. Buckets refill steadily, so
there is no minute to wait for; they live in memory, and a restart fills them. `shared_quotas` counts several servers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from adapters_store.accounts.records import Quotas
from server.api.wire.errors import ApiError

_CONCURRENCY_RETRY_S = 1.0
_SWEEP_EVERY = 4096


@dataclass(slots=True)
class Bucket:
    """capacity: what a minute allows, and what can be taken at once."""

    capacity: float
    level: float
    updated_s: float

    def refill(self, capacity: float, now_s: float) -> None:
        """capacity: as of now; what a larger one adds may be used at once."""
        grown = max(0.0, capacity - self.capacity)
        self.level = min(capacity, self.level + grown + (now_s - self.updated_s) * capacity / 60.0)
        self.capacity, self.updated_s = capacity, now_s

    def wait_s(self, amount: float) -> float:
        """How long until so much is there; 0 if it is."""
        missing = amount - self.level
        return 0.0 if missing <= 0.0 else 60.0 * missing / self.capacity

    def give_back(self, amount: float) -> None:
        self.level = min(self.capacity, self.level + amount)


@dataclass(slots=True)
class TenantUsage:
    """What is left of a tenant's rates, and how many of its sequences run."""

    buckets: dict[str, Bucket] = field(default_factory=dict)
    num_concurrent: int = 0


@dataclass(slots=True)
class Reservation:
    """What one call holds until `settle`. headers: x-ratelimit-*, as they are after it."""

    usage: TenantUsage
    num_tokens: int
    num_sequences: int
    headers: Mapping[str, str]
    is_settled: bool = False

    def settle(self, num_used_tokens: int) -> None:
        """The call is over: give back what it reserved and did not use. A second call does nothing."""
        if self.is_settled:
            return
        self.is_settled = True
        self.usage.num_concurrent -= self.num_sequences
        if "tokens" in self.usage.buckets:
            self.usage.buckets["tokens"].give_back(max(0, self.num_tokens - num_used_tokens))


@dataclass(slots=True)
class Admission:
    """One request, taken before anything of it was read. It is spent unless `undo` gives it back."""

    usage: TenantUsage
    is_undone: bool = False

    def undo(self) -> None:
        if not self.is_undone and "requests" in self.usage.buckets:
            self.usage.buckets["requests"].give_back(1)
        self.is_undone = True


class RateLimits:
    """All tenants' buckets and running sequences. Used on the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_tenant: dict[str, TenantUsage] = {}
        self._sweep_at = _SWEEP_EVERY

    def admit(self, tenant: str, quotas: Quotas) -> Admission:
        """Take one request of a tenant, if the quota allows the smallest one. Raises ApiError 429 as `reserve` does.

        `reserve` then wants the request itself: undo the admission right before it.
        """
        usage = self._usage_of(tenant, quotas)
        check(usage, quotas, {"requests": 1, "tokens": 1}, num_sequences=1)
        if "requests" in usage.buckets:
            usage.buckets["requests"].level -= 1
        return Admission(usage)

    def reserve(self, tenant: str, quotas: Quotas, *, num_tokens: int, num_sequences: int) -> Reservation:
        """Take one request, its tokens and its sequences; all or nothing.

        Raises ApiError 429: request_exceeds_quota (never repeat it), concurrency_limit, requests_per_minute or
        tokens_per_minute (with when to come back).
        """
        usage = self._usage_of(tenant, quotas)
        wanted = {"requests": 1, "tokens": num_tokens}
        check(usage, quotas, wanted, num_sequences)
        for what, bucket in usage.buckets.items():
            bucket.level -= wanted[what]
        usage.num_concurrent += num_sequences
        return Reservation(usage, num_tokens, num_sequences, headers_of(usage))

    def _usage_of(self, tenant: str, quotas: Quotas) -> TenantUsage:
        if tenant not in self._by_tenant and len(self._by_tenant) >= self._sweep_at:
            self._forget_idle()
            self._sweep_at = max(_SWEEP_EVERY, 2 * len(self._by_tenant))
        usage, now_s = self._by_tenant.setdefault(tenant, TenantUsage()), self._clock()
        for what, limit in (("requests", quotas.requests_per_minute), ("tokens", quotas.tokens_per_minute)):
            if limit is None:
                usage.buckets.pop(what, None)
            else:
                bucket = usage.buckets.setdefault(what, Bucket(limit, limit, now_s))
                bucket.refill(limit, now_s)
        return usage

    def _forget_idle(self) -> None:
        """Drop tenants with full buckets and no running sequences."""
        now_s = self._clock()
        for tenant, usage in list(self._by_tenant.items()):
            for bucket in usage.buckets.values():
                bucket.refill(bucket.capacity, now_s)
            is_full = all(bucket.level >= bucket.capacity for bucket in usage.buckets.values())
            if is_full and not usage.num_concurrent:
                del self._by_tenant[tenant]


def check(usage: TenantUsage, quotas: Quotas, wanted: Mapping[str, int], num_sequences: int) -> None:
    """Raises ApiError 429 unless `wanted` and the sequences are there."""
    headers = headers_of(usage)
    for what, bucket in usage.buckets.items():
        if wanted[what] > bucket.capacity:
            raise _too_large(what, wanted[what], int(bucket.capacity), headers)
    running, limit = usage.num_concurrent, quotas.max_concurrent
    if limit is not None and num_sequences > limit:
        raise _too_large("sequences at once", num_sequences, limit, headers)
    if limit is not None and running + num_sequences > limit:
        message = f"{running} sequences of this tenant are running, {num_sequences} more would exceed {limit}"
        raise ApiError(429, "concurrency_limit", message, retry_after_s=_CONCURRENCY_RETRY_S, headers=headers)
    for what, bucket in usage.buckets.items():
        wait_s = bucket.wait_s(wanted[what])
        if wait_s > 0.0:
            left = f"the quota is {int(bucket.capacity)}, {int(bucket.level)} are left"
            message = f"{what} per minute: {left}, this request needs {wanted[what]}"
            raise ApiError(429, f"{what}_per_minute", message, retry_after_s=wait_s, headers=headers)


def headers_of(usage: TenantUsage) -> dict[str, str]:
    """As OpenAI sends them: limit and remaining as numbers, reset as how long until all of it is back."""
    headers = {}
    for what, bucket in usage.buckets.items():
        headers[f"x-ratelimit-limit-{what}"] = str(int(bucket.capacity))
        headers[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.level)))
        headers[f"x-ratelimit-reset-{what}"] = f"{bucket.wait_s(bucket.capacity):.3f}s"
    return headers


def _too_large(what: str, wanted: int, limit: int, headers: Mapping[str, str]) -> ApiError:
    message = f"this request needs {wanted} {what}; the tenant's quota is {limit}"
    return ApiError(429, "request_exceeds_quota", message, headers={**headers, "x-should-retry": "false"})
