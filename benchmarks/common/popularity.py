"""Which adapter each request asks for. One module for tests and benchmarks, after Punica's five workloads."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Popularity = Literal["identical", "distinct", "uniform", "zipf", "skewed"]
POPULARITIES: tuple[Popularity, ...] = get_args(Popularity)


def choose_adapters(popularity: Popularity, num_requests: int, num_adapters: int, *, seed: int = 0) -> list[int]:
    """Adapter index per request.

    identical: all adapter 0. distinct: each its own, wrapping. uniform: at random. zipf: probability 1/rank.
    skewed: half of the requests on adapter 0, the others uniform.
    """
    if num_adapters < 1:
        raise ValueError(f"num_adapters must be at least 1, got {num_adapters}")
    rng = np.random.default_rng(seed)
    if popularity == "identical":
        return [0] * num_requests
    if popularity == "distinct":
        return [index % num_adapters for index in range(num_requests)]
    if popularity == "uniform":
        return [int(index) for index in rng.integers(0, num_adapters, num_requests)]
    if popularity == "zipf":
        weights = 1.0 / np.arange(1, num_adapters + 1)
        return [int(index) for index in rng.choice(num_adapters, num_requests, p=weights / weights.sum())]
    if popularity == "skewed":
        others = rng.integers(0, num_adapters, num_requests)
        return [int(index) for index in np.where(rng.random(num_requests) < 0.5, 0, others)]
    raise ValueError(f"popularity must be one of {POPULARITIES}, got {popularity!r}")
