"""How much room lately used adapters take together, and the warning before they do not fit."""

from __future__ import annotations

import pytest

from adapters_store.tiers.working_set import WorkingSet
from support.worlds.adapter_memory import FakeClock, digest_of


def test_an_adapter_counts_once_and_for_a_window_after_its_last_use() -> None:
    clock = FakeClock()
    working = WorkingSet(100, clock, window_s=60.0)
    for name in ("a", "b", "a", "a"):
        working.note(digest_of(name), 20)
    assert working.ratio() == 0.4
    clock.advance(35)
    working.note(digest_of("b"), 20)
    assert working.ratio() == 0.4
    working.note(digest_of("b"), 20)
    clock.advance(35)
    assert working.ratio() == 0.2
    clock.advance(3600)
    assert working.ratio() == 0.0


def test_the_warning_comes_before_the_cliff_and_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    working = WorkingSet(100, clock)
    for index in range(12):
        working.note(digest_of(f"a{index}"), 10)
        working.ratio()
        clock.advance(0.25)
        assert len(caplog.records) == (index >= 7)
    assert "80 % of the device pool (8 adapters)" in caplog.text
