"""Tokens used, by day, tenant and adapter version: what is billed. Only ever added to. Knows no request.

Kept by names, so that a deleted tenant's or adapter's usage can still be billed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import eq, ge, le
from typing import Any, NamedTuple

from sqlalchemy import Connection, Insert, select, true
from sqlalchemy.dialects import postgresql, sqlite

from adapters_store.storage.database import Database
from adapters_store.storage.schema import usage_days


class UsageKey(NamedTuple):
    """day: YYYY-MM-DD, UTC. adapter: "name@3", "base", those that one request named together as "a@1+b@2", or "other":
    a tenant's further sets of these."""

    day: str
    tenant: str
    adapter: str


@dataclass(slots=True)
class UsageCounts:
    """cached_tokens: of the prompt tokens, those that the prefix cache gave."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def add(self, other: UsageCounts) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens


Usage = tuple[UsageKey, UsageCounts]
_COUNTS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")


class UsageStore:
    """The rows of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, used: Mapping[UsageKey, UsageCounts]) -> None:
        """Add all of it, or nothing. Raises StoreError (disk_full, store_unavailable)."""
        if not used:
            return
        rows = [{**key._asdict(), **asdict(counts)} for key, counts in sorted(used.items(), key=lambda item: item[0])]
        with self._database.write(changes_answers=False) as connection:
            connection.execute(_adding(connection), rows)

    def rows(self, *, tenant: str | None = None, start: str | None = None, end: str | None = None) -> list[Usage]:
        """By day, tenant and adapter. start, end: the first and the last day."""
        bounds = ((usage_days.c.tenant, eq, tenant), (usage_days.c.day, ge, start), (usage_days.c.day, le, end))
        conditions = [compare(column, value) for column, compare, value in bounds if value is not None]
        statement = select(usage_days).where(true(), *conditions).order_by(*usage_days.primary_key)
        with self._database.read() as connection:
            found = connection.execute(statement).all()
        return [(UsageKey(*row[:3]), UsageCounts(*row[3:])) for row in found]


def total_of(rows: Iterable[Usage]) -> UsageCounts:
    total = UsageCounts()
    for _, counts in rows:
        total.add(counts)
    return total


def to_json(rows: Sequence[Usage]) -> list[dict[str, Any]]:
    """As the API and the command show them; OpenAI's word for output is completion."""
    return [{"id": "/".join(key), "object": "usage", **key._asdict(), **counts_to_json(counts)} for key, counts in rows]


def counts_to_json(counts: UsageCounts) -> dict[str, int]:
    return {
        "requests": counts.requests,
        "prompt_tokens": counts.prompt_tokens,
        "cached_tokens": counts.cached_tokens,
        "completion_tokens": counts.output_tokens,
    }


def _adding(connection: Connection) -> Insert:
    """One statement of both databases that we run on: insert, or add to the row that is there."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(usage_days)
    sums = {name: usage_days.c[name] + statement.excluded[name] for name in _COUNTS}
    adding: Insert = statement.on_conflict_do_update(index_elements=list(usage_days.primary_key), set_=sums)
    return adding
