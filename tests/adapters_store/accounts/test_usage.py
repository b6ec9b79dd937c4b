"""Usage rows only ever grow, by exactly what is added, whoever else writes."""

from __future__ import annotations

import threading
from dataclasses import astuple
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from adapters_store.accounts.usage import UsageCounts, UsageKey, total_of
from adapters_store.store import AdapterStore

KEY = UsageKey("2026-01-02", "acme", "law@1")


def test_what_is_added_again_is_added_to_the_row(store: AdapterStore) -> None:
    store.usage.add({KEY: UsageCounts(1, 10, 4, 3)})
    store.usage.add({KEY: UsageCounts(2, 5, 0, 7), KEY._replace(adapter="base"): UsageCounts(1, 1, 0, 1)})
    assert store.usage.rows() == [
        (KEY._replace(adapter="base"), UsageCounts(1, 1, 0, 1)),
        (KEY, UsageCounts(3, 15, 4, 10)),
    ]


def test_rows_are_chosen_by_tenant_and_days(store: AdapterStore) -> None:
    days = ["2025-12-31", "2026-01-01", "2026-01-02"]
    store.usage.add({UsageKey(day, tenant, "base"): UsageCounts(1) for day in days for tenant in ("acme", "globex")})
    assert [key.day for key, _ in store.usage.rows(tenant="acme")] == days
    assert [key.day for key, _ in store.usage.rows(tenant="acme", start=days[1], end=days[1])] == days[1:2]
    assert astuple(total_of(store.usage.rows())) == (6, 0, 0, 0)


def test_usage_outlives_the_tenant_it_is_billed_to(store: AdapterStore) -> None:
    store.usage.add({KEY: UsageCounts(1, 2, 0, 3)})
    store.tenants.delete("acme")
    assert store.usage.rows(tenant="acme") == [(KEY, UsageCounts(1, 2, 0, 3))]


def test_servers_on_one_database_add_up(store: AdapterStore, data_dir: Path) -> None:
    other = AdapterStore.open(data_dir)
    writers = [
        threading.Thread(target=lambda each=each: [each.usage.add({KEY: UsageCounts(1, 2, 3, 4)}) for _ in range(25)])
        for each in (store, other, store, other)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    other.close()
    assert store.usage.rows() == [(KEY, UsageCounts(100, 200, 300, 400))]


def test_writing_usage_makes_nobody_ask_the_database_anew(store: AdapterStore) -> None:
    before = store.database.generation()
    store.usage.add({KEY: UsageCounts(1)})
    assert store.database.generation() == before


def test_a_batch_is_added_whole_or_not_at_all(store: AdapterStore) -> None:
    with store.database.write() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER no_base BEFORE INSERT ON usage_days WHEN NEW.adapter = 'base' "
            "BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    with pytest.raises((OperationalError, Exception), match="no"):
        store.usage.add({KEY._replace(adapter="aaa"): UsageCounts(1), KEY._replace(adapter="base"): UsageCounts(1)})
    assert store.usage.rows() == []
