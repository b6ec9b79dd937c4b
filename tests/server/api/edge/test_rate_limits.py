"""Buckets under a clock of the test's own."""

from __future__ import annotations

import pytest

from adapters_store.accounts.records import Quotas
from server.api.edge.rate_limits import RateLimits, Reservation
from server.api.wire.errors import ApiError
from support.worlds.adapter_memory import FakeClock


class Limits:
    """RateLimits of one tenant."""

    def __init__(self, **quotas: int) -> None:
        self.clock = FakeClock()
        self.quotas = Quotas(**quotas)
        self.limits = RateLimits(self.clock)

    def reserve(self, num_tokens: int = 10, num_sequences: int = 1, tenant: str = "law") -> Reservation:
        return self.limits.reserve(tenant, self.quotas, num_tokens=num_tokens, num_sequences=num_sequences)

    def refused(self, num_tokens: int = 10, num_sequences: int = 1) -> ApiError:
        with pytest.raises(ApiError) as refusal:
            self.reserve(num_tokens, num_sequences)
        assert refusal.value.status == 429
        return refusal.value


def test_requests_beyond_the_minute_are_told_when_one_more_is_there() -> None:
    limits = Limits(requests_per_minute=6)
    for _ in range(6):
        limits.reserve().settle(0)
    error = limits.refused()
    assert (error.code, error.headers["retry-after"], error.headers["x-should-retry"]) == (
        "requests_per_minute",
        "10",
        "true",
    )
    limits.clock.advance(9.9)
    limits.refused()
    limits.clock.advance(0.2)
    assert limits.reserve().headers["x-ratelimit-remaining-requests"] == "0"


def test_tokens_are_reserved_whole_and_what_is_not_used_comes_back() -> None:
    limits = Limits(tokens_per_minute=1000)
    reservation = limits.reserve(num_tokens=900)
    assert reservation.headers["x-ratelimit-remaining-tokens"] == "100"
    assert limits.refused(num_tokens=200).code == "tokens_per_minute"
    reservation.settle(50)
    reservation.settle(50)
    assert limits.reserve(num_tokens=200).headers["x-ratelimit-remaining-tokens"] == "750"


def test_a_refused_call_takes_nothing() -> None:
    limits = Limits(requests_per_minute=10, tokens_per_minute=100)
    limits.reserve(num_tokens=100)
    for _ in range(20):
        limits.refused(num_tokens=50)
    limits.clock.advance(30)
    assert limits.reserve(num_tokens=50).headers["x-ratelimit-remaining-requests"] == "9"


@pytest.mark.parametrize(
    ("quotas", "num_tokens", "num_sequences"),
    [({"tokens_per_minute": 99}, 100, 1), ({"max_concurrent": 3}, 1, 4), ({"requests_per_minute": 0}, 1, 1)],
)
def test_what_is_larger_than_the_whole_quota_must_not_be_repeated(
    quotas: dict[str, int], num_tokens: int, num_sequences: int
) -> None:
    error = Limits(**quotas).refused(num_tokens, num_sequences)
    assert error.code == "request_exceeds_quota"
    assert error.headers["x-should-retry"] == "false"
    assert "retry-after" not in error.headers


def test_sequences_count_while_they_are_under_way() -> None:
    limits = Limits(max_concurrent=3)
    first = limits.reserve(num_sequences=2)
    assert limits.refused(num_sequences=2).code == "concurrency_limit"
    limits.reserve(num_sequences=1)
    first.settle(0)
    limits.reserve(num_sequences=2)


def test_a_bucket_never_holds_more_than_a_minute() -> None:
    limits = Limits(tokens_per_minute=60)
    limits.reserve(num_tokens=60)
    limits.clock.advance(3600)
    limits.reserve(num_tokens=60).settle(0)
    limits.reserve(num_tokens=60).settle(500)  # more used than reserved: nothing to give back
    assert limits.refused(num_tokens=1).headers["x-ratelimit-reset-tokens"] == "60.000s"


def test_a_changed_quota_holds_at_once() -> None:
    limits = Limits(requests_per_minute=1)
    limits.reserve()
    limits.refused()
    limits.quotas = Quotas(requests_per_minute=3)
    limits.reserve()
    limits.quotas = Quotas(requests_per_minute=1)
    limits.reserve()
    limits.refused()
    limits.quotas = Quotas()
    assert limits.reserve().headers == {}


def test_tenants_do_not_share_a_bucket() -> None:
    limits = Limits(requests_per_minute=1)
    limits.reserve(tenant="law")
    limits.reserve(tenant="med")
    limits.refused()


def test_meters_of_idle_tenants_are_forgotten() -> None:
    limits = Limits(requests_per_minute=60)
    busy = limits.reserve(tenant="busy")
    for index in range(20_000):
        limits.reserve(tenant=f"t{index}").settle(0)
        limits.clock.advance(1.0)
    assert len(limits.limits._by_tenant) <= 8192
    limits.quotas = Quotas(max_concurrent=1)
    assert limits.limits.reserve("law", limits.quotas, num_tokens=1, num_sequences=1)
    with pytest.raises(ApiError):
        limits.reserve(tenant="busy")
    busy.settle(0)
    limits.reserve(tenant="busy")
