"""Cold loads of a fleet by the way requests are routed: our ranking, the least loaded, and two at random.

`python -m benchmarks.affinity [--quick]`. The ranking is the one that runs in Ray's proxy. The replicas are
models: a pool of equal adapters with LRU eviction, requests that overlap, and residents that the router knows
late. So the counts are of routing alone; they depend on no machine.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.ray_serve.ranking import Place, ranked

Route = Callable[[Sequence[Place], str, random.Random], str]


@dataclass
class Replica:
    """resident: what it has, the latest used last. known: what the router knows of that."""

    name: str
    capacity: int
    resident: OrderedDict[str, None] = field(default_factory=OrderedDict)
    known: frozenset[str] = frozenset()
    load: int = 0
    num_cold: int = 0

    def serve(self, adapter: str) -> None:
        if adapter not in self.resident:
            self.num_cold += 1
            if len(self.resident) >= self.capacity:
                self.resident.popitem(last=False)
            self.resident[adapter] = None
        self.resident.move_to_end(adapter)


@dataclass(frozen=True, kw_only=True)
class Case:
    """adapters: by Zipf's law with this exponent. capacity: adapters in a replica's pool. length: of a request, in
    requests that arrive meanwhile. told_every: arrivals between two reports of residents."""

    adapters: int = 200
    exponent: float = 1.0
    replicas: int = 2
    capacity: int = 100
    requests: int = 100_000
    length: int = 16
    told_every: int = 50
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    num_cold: int
    hit_ratio: float
    largest_share: float


def ours(places: Sequence[Place], adapter: str, _: random.Random) -> str:
    return ranked(places, model=adapter, session="")[0].name


def least_loaded(places: Sequence[Place], _: str, draw: random.Random) -> str:
    least = min(place.load for place in places)
    return draw.choice([place.name for place in places if place.load == least])


def two_at_random(places: Sequence[Place], _: str, draw: random.Random) -> str:
    """Ray Serve's default: the less loaded of two."""
    return min(draw.sample(list(places), 2), key=lambda place: place.load).name


ROUTES: dict[str, Route] = {"ours": ours, "least loaded": least_loaded, "two at random": two_at_random}


def run(case: Case, route: Route) -> Outcome:
    """One way through the same requests as every other."""
    draw = random.Random(case.seed)
    weights = [1 / (rank + 1) ** case.exponent for rank in range(case.adapters)]
    asked = draw.choices([f"tenant-{index}/style" for index in range(case.adapters)], weights, k=case.requests)
    replicas = {name: Replica(name, case.capacity) for name in (f"replica-{index}" for index in range(case.replicas))}
    ends: list[tuple[int, str]] = []
    counts = dict.fromkeys(replicas, 0)
    for now, adapter in enumerate(asked):
        while ends and ends[0][0] <= now:
            replicas[heapq.heappop(ends)[1]].load -= 1
        if now % case.told_every == 0:
            for each in replicas.values():
                each.known = frozenset(each.resident)
        places = [Place(each.name, each.load, each.known) for each in replicas.values()]
        chosen = replicas[route(places, adapter, draw)]
        chosen.serve(adapter)
        chosen.load += 1
        counts[chosen.name] += 1
        heapq.heappush(ends, (now + draw.randint(1, 2 * case.length), chosen.name))
    num_cold = sum(each.num_cold for each in replicas.values())
    return Outcome(num_cold, 1 - num_cold / case.requests, max(counts.values()) / case.requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,000 requests instead of 100,000")
    case = Case(requests=2000 if parser.parse_args().quick else 100_000)
    for name, route in ROUTES.items():
        found = run(case, route)
        print(
            f"{name:14} {found.num_cold:6d} cold loads, hit ratio {found.hit_ratio:.3f}, "
            f"largest share {found.largest_share:.2f}"
        )


if __name__ == "__main__":
    main()
