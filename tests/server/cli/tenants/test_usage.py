"""`multilora usage` shows what was written down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters_store.accounts.usage import UsageCounts, UsageKey
from adapters_store.store import AdapterStore

Command = Callable[..., Any]


@pytest.fixture
def used(data_dir: Path) -> None:
    store = AdapterStore.open(data_dir)
    for day, tenant in (("2026-01-01", "acme"), ("2026-01-02", "acme"), ("2026-01-02", "globex")):
        store.usage.add({UsageKey(day, tenant, "law@1"): UsageCounts(1, 1000, 200, 30)})
    store.close()


def test_usage_is_summed_by_tenant_and_days(used: None, run_json: Command) -> None:
    assert run_json("usage")["total"]["prompt_tokens"] == 3000
    shown = run_json("usage", "--tenant", "acme", "--start", "2026-01-02", "--end", "2026-01-02")
    assert [row["id"] for row in shown["data"]] == ["2026-01-02/acme/law@1"]
    assert shown["total"] == {"requests": 1, "prompt_tokens": 1000, "cached_tokens": 200, "completion_tokens": 30}


def test_usage_is_a_table_for_people(used: None, run: Command) -> None:
    told = run("usage").stdout
    assert "3,000" in told
    assert "law@1" in told


def test_no_usage_says_so(run: Command) -> None:
    assert run("usage").stdout == "no usage yet\n"


def test_a_day_that_is_none_is_wrong_usage(run: Command) -> None:
    assert run("usage", "--start", "yesterday").exit_code == 2
