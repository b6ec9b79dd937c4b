"""Comparisons are made within a round, in alternating order, and every layer's data gets its turn."""

from __future__ import annotations

import pytest

from benchmarks.common.timing import Spread, Sweep, interleaved, ratio


def test_every_other_round_runs_backwards_after_the_warm_up() -> None:
    ran: list[str] = []
    cases = {name: lambda name=name: ran.append(name) for name in "ab"}
    interleaved(cases, rounds=3)
    assert "".join(ran) == "ab" + "ab" + "ba" + "ab"


def test_results_come_by_case_without_the_warm_up() -> None:
    numbers = iter(range(100))
    assert interleaved({"a": lambda: next(numbers), "b": lambda: next(numbers)}, rounds=2) == {"a": [2, 5], "b": [3, 4]}


def test_ratio_is_taken_round_by_round_so_that_a_slow_minute_cancels() -> None:
    assert ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == Spread(2.0, 2.0, 2.0)


def test_ratio_refuses_a_round_without_partner() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_spread_gives_median_and_extremes_as_columns() -> None:
    assert Spread.of([3.0, 1.0, 2.0]).columns("us") == {"us": 2.0, "us_min": 1.0, "us_max": 3.0}


def test_sweep_goes_round_the_layers_so_that_none_is_warm() -> None:
    seen: list[int] = []
    sweep = Sweep(seen.append, 5, budget_s=1.0)
    before = len(seen)
    assert sweep() >= 0.0
    start = seen[before]
    assert seen[before:] == [(start + index) % 5 for index in range(5)]
