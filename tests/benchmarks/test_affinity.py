"""What routing by residency saves, on the same requests: 200 adapters by Zipf over two replicas."""

from __future__ import annotations

from benchmarks.affinity import ROUTES, Case, run


def test_our_ranking_loads_less_and_keeps_both_replicas_busy() -> None:
    case = Case(requests=10_000)
    found = {name: run(case, route) for name, route in ROUTES.items()}
    ours = found.pop("ours")
    assert ours.hit_ratio >= 0.9
    assert ours.largest_share < 0.65
    for other in found.values():
        assert ours.num_cold <= 0.7 * other.num_cold, found
