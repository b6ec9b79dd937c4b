"""The usage log writes down what was added, once, whatever happens on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.accounts.usage import UsageCounts, UsageKey
from adapters_store.errors import StoreError
from adapters_store.store import AdapterStore
from server.api.telemetry.usage_log import UsageLog
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
