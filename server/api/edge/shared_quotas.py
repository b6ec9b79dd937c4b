"""Quotas that all servers on one PostgreSQL count together: `rate_limits`' answers from the database's numbers.

A tenant without rates and concurrency costs nothing here. While the database does not answer, this server counts alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from adapters_store.accounts.meter_rows import Amounts, Levels, Take
from adapters_store.accounts.records import Quotas
from adapters_store.accounts.shared_meters import SharedMeters
from server.api.edge.meters import Admitted, Held, LocalMeters
from server.api.edge.rate_limits import Bucket, TenantUsage, check, headers_of
from server.api.wire.errors import ApiError

_PATIENCE_S = 5.0  # for one call of the database, which takes less than a millisecond if nothing is wrong
_LEAST = Amounts(requests=1, tokens=1, sequences=1)


@dataclass(slots=True)
class SharedAdmission:
    meters: SharedMeters
    tenant: str
    quotas: Quotas
    is_undone: bool = False

    def undo(self) -> None:
        if not self.is_undone:
            self.meters.give_back(self.tenant, self.quotas, Amounts(requests=1))
        self.is_undone = True


@dataclass(slots=True)
class SharedReservation:
    meters: SharedMeters
    tenant: str
    quotas: Quotas
    num_tokens: int
    num_sequences: int
    headers: Mapping[str, str]
    is_settled: bool = False

    def settle(self, num_used_tokens: int) -> None:
        if self.is_settled:
            return
        self.is_settled = True
        unused = max(0, self.num_tokens - num_used_tokens)
        self.meters.give_back(self.tenant, self.quotas, Amounts(tokens=unused, sequences=self.num_sequences))


class SharedQuotas:
    """`Meters` over one database."""

    def __init__(self, meters: SharedMeters) -> None:
        self._meters = meters
        self._local = LocalMeters()

    def start(self) -> None:
        self._meters.start()

    def stop(self) -> None:
        self._meters.stop()

    async def admit(self, tenant: str, quotas: Quotas) -> Admitted:
        if not _has_rates(quotas):
            return await self._local.admit(tenant, quotas)
        wanted = Take(tenant=tenant, quotas=quotas, needs=_LEAST, takes=Amounts(requests=1))
        levels = await self._take(wanted)
        if levels is None:
            return await self._local.admit(tenant, quotas)
        _require(levels, quotas, _LEAST)
        return SharedAdmission(self._meters, tenant, quotas)

    async def reserve(
        self, tenant: str, quotas: Quotas, admitted: Admitted | None, *, num_tokens: int, num_sequences: int
    ) -> Held:
        taken_before = isinstance(admitted, SharedAdmission) and not admitted.is_undone
        if not _has_rates(quotas):
            return await self._alone(tenant, quotas, admitted, num_tokens, num_sequences)
        amounts = Amounts(requests=0 if taken_before else 1, tokens=num_tokens, sequences=num_sequences)
        wanted = Take(tenant=tenant, quotas=quotas, needs=amounts, takes=amounts, refunds=int(taken_before))
        levels = await self._take(wanted)
        if levels is None:
            return await self._alone(tenant, quotas, admitted, num_tokens, num_sequences)
        if isinstance(admitted, SharedAdmission):
            admitted.is_undone = True  # it is part of this reservation, or was given back with its refusal
        elif admitted is not None:
            admitted.undo()
        _require(levels, quotas, Amounts(requests=1, tokens=num_tokens, sequences=num_sequences))
        headers = headers_of(_usage_of(levels, quotas))
        return SharedReservation(self._meters, tenant, quotas, num_tokens, num_sequences, headers)

    async def _alone(
        self, tenant: str, quotas: Quotas, admitted: Admitted | None, num_tokens: int, num_sequences: int
    ) -> Held:
        return await self._local.reserve(tenant, quotas, admitted, num_tokens=num_tokens, num_sequences=num_sequences)

    async def _take(self, wanted: Take) -> Levels | None:
        """None: the database did not answer in time. What it takes for a call that no longer waits is given back."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Levels | None] = loop.create_future()

        def answer(levels: Levels | None) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(partial(self._deliver, future, wanted, levels))

        self._meters.take(wanted, answer)
        try:
            return await asyncio.wait_for(future, _PATIENCE_S)
        except (TimeoutError, asyncio.CancelledError) as end:
            if future.done() and not future.cancelled():  # both at the same moment
                self._undo(wanted, future.result())
            if isinstance(end, TimeoutError):
                return None
            raise

    def _deliver(self, future: asyncio.Future[Levels | None], wanted: Take, levels: Levels | None) -> None:
        if future.done():
            self._undo(wanted, levels)
        else:
            future.set_result(levels)

    def _undo(self, wanted: Take, levels: Levels | None) -> None:
        if levels is not None and levels.is_taken:
            self._meters.give_back(wanted.tenant, wanted.quotas, wanted.takes)


def _has_rates(quotas: Quotas) -> bool:
    return (quotas.requests_per_minute, quotas.tokens_per_minute, quotas.max_concurrent) != (None, None, None)


def _usage_of(levels: Levels, quotas: Quotas) -> TenantUsage:
    buckets = {}
    for what, limit, level in (
        ("requests", quotas.requests_per_minute, levels.requests),
        ("tokens", quotas.tokens_per_minute, levels.tokens),
    ):
        if limit is not None:
            buckets[what] = Bucket(limit, limit if level is None else level, 0.0)
    return TenantUsage(buckets, levels.num_running)


def _require(levels: Levels, quotas: Quotas, wanted: Amounts) -> None:
    """Raises ApiError 429 if nothing was taken."""
    if levels.is_taken:
        return
    usage = _usage_of(levels, quotas)
    check(usage, quotas, {"requests": wanted.requests, "tokens": wanted.tokens}, wanted.sequences)
    raise ApiError(429, "concurrency_limit", "the quota was just used up; try again", retry_after_s=1.0)
