"""A small table of devices: memory, speed, links (data sheets), and price (assumed)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from trainer.planner.shapes import PlanError

PRICES_AS_OF = "2026-11"


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory_bytes: the data sheet's GB as 10^9 bytes; drivers show up to 7 % more, which is left as reserve.

    flops: dense bfloat16 with float32 accumulation. link_bytes_per_s: to its neighbours, one direction (NVLink, or PCIe
    if there is none). usd_per_hour: a rough on-demand price.
    """

    name: str
    memory_bytes: int
    flops: float
    link_bytes_per_s: float
    usd_per_hour: float


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("l4", 24 * 10**9, 121e12, 32e9, 0.70),
        Gpu("rtx4090", 24 * 10**9, 165e12, 32e9, 0.50),
        Gpu("l40s", 48 * 10**9, 362e12, 32e9, 1.20),
        Gpu("a100-80", 80 * 10**9, 312e12, 300e9, 1.60),
        Gpu("h100", 80 * 10**9, 989e12, 450e9, 2.80),
        Gpu("h200", 141 * 10**9, 989e12, 450e9, 3.60),
        Gpu("b200", 180 * 10**9, 2250e12, 900e9, 5.50),
    )
}


def gpu_of(name: str, *, usd_per_hour: float | None = None) -> Gpu:
    """A device of the table, at another price if one is given. Raises PlanError for one that is not in it."""
    if name not in GPUS:
        raise PlanError("gpu", f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name] if usd_per_hour is None else replace(GPUS[name], usd_per_hour=usd_per_hour)
