"""The rows in which servers on one PostgreSQL count a tenant's rates and running sequences together. SQL only.

One UPDATE decides and takes. PostgreSQL runs updates of a row one after the other, each on the values that the one
before left, so the servers together never take more than the quota. All times are the database's.
Source: https://www.postgresql.org/docs/current/transaction-iso.html#XACT-READ-COMMITTED
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from adapters_store.accounts.records import Quotas

LIFE_S = 15.0  # how long a server's running sequences count after its last sign of life


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """Of one tenant: requests and tokens of its minute, sequences at once. Negative: given back."""

    requests: int = 0
    tokens: int = 0
    sequences: int = 0

    def __neg__(self) -> Amounts:
        return Amounts(requests=-self.requests, tokens=-self.tokens, sequences=-self.sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """What one call wants. needs: what has to be there; None: take in any case. takes: what is taken if it is there.

    refunds: requests given back if it is not, those that an earlier call took.
    """

    tenant: str
    quotas: Quotas
    takes: Amounts = Amounts()
    needs: Amounts | None = None
    refunds: int = 0


@dataclass(frozen=True, slots=True)
class Levels:
    """After the call. num_running: of all servers. Levels are None without a quota."""

    is_taken: bool
    requests: float | None
    tokens: float | None
    num_running: int


_NOW = "extract(epoch FROM statement_timestamp())::float8"


def _refilled(what: str) -> str:
    """The level now, with what the time since the last call and a larger quota add; a new quota is full."""
    capacity = f"CAST(:{what}_capacity AS float8)"
    grown = f"greatest(0, {capacity} - {what}_capacity)"
    seconds = f"greatest(0, {_NOW} - updated_s)"
    return f"least({capacity}, coalesce({what}_level + {grown} + {seconds} * {capacity} / 60.0, {capacity}))"


_OTHERS = f"jsonb_each(m.running) AS each WHERE each.key <> :server AND (each.value->>1)::float8 > {_NOW} - {LIFE_S}"
_NUM_OTHERS = f"(SELECT coalesce(sum((each.value->>0)::int), 0) FROM {_OTHERS})"
_IS_THERE = f"""(:forced
    OR coalesce({_refilled("requests")} >= :need_requests, true)
    AND coalesce({_refilled("tokens")} >= :need_tokens, true)
    AND coalesce({_NUM_OTHERS} + :own + :need_sequences <= CAST(:max_concurrent AS bigint), true))"""
_OWN = f"(:own + CASE WHEN {_IS_THERE} THEN :take_sequences ELSE 0 END)"

_TAKE = text(f"""
    UPDATE tenant_meters AS m SET
        is_taken = {_IS_THERE},
        requests_level = least(CAST(:requests_capacity AS float8),
            {_refilled("requests")} + CASE WHEN {_IS_THERE} THEN -:take_requests ELSE :refunds END),
        tokens_level = least(CAST(:tokens_capacity AS float8),
            {_refilled("tokens")} - CASE WHEN {_IS_THERE} THEN :take_tokens ELSE 0 END),
        requests_capacity = CAST(:requests_capacity AS float8),
        tokens_capacity = CAST(:tokens_capacity AS float8),
        updated_s = greatest(updated_s, {_NOW}),
        running = (SELECT coalesce(jsonb_object_agg(each.key, each.value), '{{}}') FROM {_OTHERS})
            || CASE WHEN {_OWN} > 0
               THEN jsonb_build_object(CAST(:server AS text), jsonb_build_array({_OWN}, {_NOW})) ELSE '{{}}' END
    WHERE tenant_id = (SELECT id FROM tenants WHERE name = :tenant)
    RETURNING is_taken, requests_level, tokens_level,
        (SELECT coalesce(sum((each.value->>0)::int), 0) FROM jsonb_each(m.running) AS each) AS num_running
""")
_ADD_ROW = text(f"""
    INSERT INTO tenant_meters (tenant_id, updated_s, running, is_taken)
    SELECT id, {_NOW}, '{{}}', false FROM tenants WHERE name = :tenant ON CONFLICT DO NOTHING
""")


def take(connection: Connection, server: str, own: int, wanted: Take) -> Levels | None:
    """Take it, or nothing. own: this server's running sequences of the tenant before. None: there is no such tenant."""
    values = _values(server, own, wanted)
    row = connection.execute(_TAKE, values).first()
    if row is None:
        connection.execute(_ADD_ROW, {"tenant": wanted.tenant})
        row = connection.execute(_TAKE, values).first()
    return None if row is None else Levels(row.is_taken, row.requests_level, row.tokens_level, int(row.num_running))


def _values(server: str, own: int, wanted: Take) -> dict[str, Any]:
    needs, takes, quotas = wanted.needs or Amounts(), wanted.takes, wanted.quotas
    return {
        "server": server,
        "tenant": wanted.tenant,
        "own": own,
        "forced": wanted.needs is None,
        "need_requests": needs.requests,
        "need_tokens": needs.tokens,
        "need_sequences": needs.sequences,
        "take_requests": takes.requests,
        "take_tokens": takes.tokens,
        "take_sequences": takes.sequences,
        "refunds": wanted.refunds,
        "requests_capacity": quotas.requests_per_minute,
        "tokens_capacity": quotas.tokens_per_minute,
        "max_concurrent": quotas.max_concurrent,
    }
