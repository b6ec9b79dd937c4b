"""The usage log writes down what was added, once, whatever happens on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from adapters_store.accounts.usage import UsageCounts, UsageKey, total_of
from adapters_store.errors import StoreError
from adapters_store.store import AdapterStore
from server.api.telemetry.usage_log import MAX_SETS, UsageLog
from support.servers.waiting import wait_until
from support.stopwatch import quiet_s

DAY_S = 86_400


@pytest.fixture
def own_store(tmp_path: Path) -> Iterator[AdapterStore]:
    store = AdapterStore.open(tmp_path)
    yield store
    store.close()


def test_each_token_is_billed_to_the_day_it_was_served(own_store: AdapterStore) -> None:
    now_s = [20_000 * DAY_S - 1.0]
    log = UsageLog(own_store.usage, clock=lambda: now_s[0])
    for _ in range(3):
        log.add("acme", "base", UsageCounts(0, 0, 0, 5))
        now_s[0] += DAY_S
    log.flush()
    assert [key.day for key, _ in own_store.usage.rows()] == ["2024-10-03", "2024-10-04", "2024-10-05"]


def test_what_cannot_be_written_is_written_later_and_once(
    own_store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = UsageLog(own_store.usage)
    log.add("acme", "base", UsageCounts(1, 2, 3, 4))

    def full(_: object) -> None:
        raise StoreError("disk_full", "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(own_store.usage, "add", full)
        with pytest.raises(StoreError):
            log.flush()
    log.add("acme", "base", UsageCounts(1, 0, 0, 1))
    log.flush()
    log.flush()
    [(_, counts)] = own_store.usage.rows()
    assert counts == UsageCounts(2, 2, 3, 5)


def test_sets_of_adapters_have_as_many_rows_as_are_allowed_and_every_token_is_in_one(own_store: AdapterStore) -> None:
    now_s = [20_000 * DAY_S - 1.0]
    log = UsageLog(own_store.usage, clock=lambda: now_s[0])
    names = [f"a{index}@1" for index in range(50)]
    sets = ["+".join(pair) for pair in combinations(names, 2)]
    for _ in range(2):
        for part in (sets[:600], sets[600:], names):
            for adapter in part:
                log.add("acme", adapter, UsageCounts(1, 2, 0, 3))
            log.add("globex", "a@1+b@1", UsageCounts(1))
            log.flush()
        now_s[0] += 2.0
    rows = own_store.usage.rows(tenant="acme")
    for day in ("2024-10-03", "2024-10-04"):
        found = {key.adapter: counts for key, counts in rows if key.day == day}
        assert found.keys() == {*sets[:MAX_SETS], "other", *names}
        assert found["other"].requests == len(sets) - MAX_SETS
    assert {key.adapter for key, _ in own_store.usage.rows(tenant="globex")} == {"a@1+b@1"}
    num_requests = 2 * (len(sets) + len(names))
    assert total_of(rows) == UsageCounts(num_requests, 2 * num_requests, 0, 3 * num_requests)


def test_the_thread_writes_within_its_interval_and_at_the_end(own_store: AdapterStore) -> None:
    log = UsageLog(own_store.usage, flush_every_s=0.05)
    log.start()
    log.add("acme", "base", UsageCounts(1))
    wait_until(lambda: len(own_store.usage.rows()) == 1)
    log.add("globex", "base", UsageCounts(1))
    log.stop()
    assert {key.tenant for key, _ in own_store.usage.rows()} == {"acme", "globex"}


def test_adding_costs_microseconds(own_store: AdapterStore) -> None:
    log = UsageLog(own_store.usage)
    counts = UsageCounts(0, 0, 0, 1)
    assert quiet_s(lambda: [log.add("acme", f"a{index % 50}", counts) for index in range(1000)], tries=5) / 1000 < 50e-6
    log.flush()
    assert UsageKey(time.strftime("%Y-%m-%d", time.gmtime()), "acme", "a0") in dict(own_store.usage.rows())
