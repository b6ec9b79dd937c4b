"""Holds tenants to their quotas: requests and tokens per minute, sequences at once. Takes a clock; knows no HTTP but
its own refusals and headers.

A request takes what it may cost, prompt and max_tokens, and gives back what it did not use. Buckets refill steadily, so
there is no minute to wait for; they live in memory, and a restart fills them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from adapters_store.versions.records import Quotas
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
class _Meters:
    buckets: dict[str, Bucket] = field(default_factory=dict)
    num_concurrent: int = 0


@dataclass(slots=True)
class Reservation:
    """What one call holds until `settle`. headers: x-ratelimit-*, as they are after it."""

    meters: _Meters
    num_tokens: int
    num_sequences: int
    headers: Mapping[str, str]
    is_settled: bool = False

    def settle(self, num_used_tokens: int) -> None:
        """The call is over: give back what it reserved and did not use. A second call does nothing."""
        if self.is_settled:
            return
        self.is_settled = True
        self.meters.num_concurrent -= self.num_sequences
        if "tokens" in self.meters.buckets:
            self.meters.buckets["tokens"].give_back(max(0, self.num_tokens - num_used_tokens))


@dataclass(slots=True)
class Admission:
    """One request, taken before anything of it was read. It is spent unless `undo` gives it back."""

    meters: _Meters
    is_undone: bool = False

    def undo(self) -> None:
        if not self.is_undone and "requests" in self.meters.buckets:
            self.meters.buckets["requests"].give_back(1)
        self.is_undone = True


class RateLimits:
    """All tenants' meters. Used on the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._meters: dict[str, _Meters] = {}
        self._sweep_at = _SWEEP_EVERY

    def admit(self, tenant: str, quotas: Quotas) -> Admission:
        """Take one request of a tenant, if the quota allows the smallest one. Raises ApiError 429 as `reserve` does.

        `reserve` then wants the request itself: undo the admission right before it.
        """
        meters = self._metered(tenant, quotas)
        self._check(meters, quotas, {"requests": 1, "tokens": 1}, num_sequences=1)
        if "requests" in meters.buckets:
            meters.buckets["requests"].level -= 1
        return Admission(meters)

    def reserve(self, tenant: str, quotas: Quotas, *, num_tokens: int, num_sequences: int) -> Reservation:
        """Take one request, its tokens and its sequences; all or nothing.

        Raises ApiError 429: request_exceeds_quota (never repeat it), concurrency_limit, requests_per_minute or
        tokens_per_minute (with when to come back).
        """
        meters = self._metered(tenant, quotas)
        wanted = {"requests": 1, "tokens": num_tokens}
        self._check(meters, quotas, wanted, num_sequences)
        for what, bucket in meters.buckets.items():
            bucket.level -= wanted[what]
        meters.num_concurrent += num_sequences
        return Reservation(meters, num_tokens, num_sequences, _headers(meters))

    def _metered(self, tenant: str, quotas: Quotas) -> _Meters:
        if tenant not in self._meters and len(self._meters) >= self._sweep_at:
            self._forget_idle()
            self._sweep_at = max(_SWEEP_EVERY, 2 * len(self._meters))
        meters, now_s = self._meters.setdefault(tenant, _Meters()), self._clock()
        for what, limit in (("requests", quotas.requests_per_minute), ("tokens", quotas.tokens_per_minute)):
            if limit is None:
                meters.buckets.pop(what, None)
            else:
                bucket = meters.buckets.setdefault(what, Bucket(limit, limit, now_s))
                bucket.refill(limit, now_s)
        return meters

    def _check(self, meters: _Meters, quotas: Quotas, wanted: Mapping[str, int], num_sequences: int) -> None:
        headers = _headers(meters)
        for what, bucket in meters.buckets.items():
            if wanted[what] > bucket.capacity:
                raise _too_large(what, wanted[what], int(bucket.capacity), headers)
        self._check_concurrent(meters, quotas, num_sequences, headers)
        for what, bucket in meters.buckets.items():
            wait_s = bucket.wait_s(wanted[what])
            if wait_s > 0.0:
                raise _too_soon(what, wanted[what], bucket, wait_s, headers)

    @staticmethod
    def _check_concurrent(meters: _Meters, quotas: Quotas, num_sequences: int, headers: Mapping[str, str]) -> None:
        limit = quotas.max_concurrent
        if limit is None or meters.num_concurrent + num_sequences <= limit:
            return
        if num_sequences > limit:
            raise _too_large("sequences at once", num_sequences, limit, headers)
        running = f"{meters.num_concurrent} sequences of this tenant are running"
        message = f"{running}, {num_sequences} more would exceed {limit}"
        raise ApiError(429, "concurrency_limit", message, retry_after_s=_CONCURRENCY_RETRY_S, headers=headers)

    def _forget_idle(self) -> None:
        """Drop meters that are full and have no running sequences."""
        now_s = self._clock()
        for tenant, meters in list(self._meters.items()):
            for bucket in meters.buckets.values():
                bucket.refill(bucket.capacity, now_s)
            is_full = all(bucket.level >= bucket.capacity for bucket in meters.buckets.values())
            if is_full and not meters.num_concurrent:
                del self._meters[tenant]

    def __len__(self) -> int:
        return len(self._meters)


def _headers(meters: _Meters) -> dict[str, str]:
    """As OpenAI sends them: limit and remaining as numbers, reset as how long until all of it is back."""
    headers = {}
    for what, bucket in meters.buckets.items():
        headers[f"x-ratelimit-limit-{what}"] = str(int(bucket.capacity))
        headers[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.level)))
        headers[f"x-ratelimit-reset-{what}"] = f"{bucket.wait_s(bucket.capacity):.3f}s"
    return headers


def _too_large(what: str, wanted: int, limit: int, headers: Mapping[str, str]) -> ApiError:
    message = f"this request needs {wanted} {what}; the tenant's quota is {limit}"
    return ApiError(429, "request_exceeds_quota", message, headers={**headers, "x-should-retry": "false"})


def _too_soon(what: str, wanted: int, bucket: Bucket, wait_s: float, headers: Mapping[str, str]) -> ApiError:
    left = f"the quota is {int(bucket.capacity)}, {int(bucket.level)} are left"
    message = f"{what} per minute: {left}, this request needs {wanted}"
    return ApiError(429, f"{what}_per_minute", message, retry_after_s=wait_s, headers=headers)
