"""The nouns of adapter memory: its settings and its counters. No decisions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AdapterTiersSettings:
    """max_copies: copies under way at once, and started between two polls at most: bounds what one step pays.

    max_loads: loads queued in the host tier at once, so that a later, more urgent one is not queued behind many others.
    recheck_s: how often missing adapters are tried again if nothing has changed.
    """

    max_copies: int = 2
    max_loads: int = 8
    recheck_s: float = 0.05

    def __post_init__(self) -> None:
        for name in ("max_copies", "max_loads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(slots=True)
class HostTierStats:
    """hits: copies to the device that needed no load. misses: loads queued."""

    loads: int = 0
    failures: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class AdapterTiersStats:
    """misses: times an adapter was newly wanted and was not on the device. working_set_ratio: the size of all
    adapters used in the last minute, as a share of the device's capacity. largest_free_elements: the longest free
    range. num_more: see `DevicePool`. The rest is as in the tiers' own stats."""

    hits: int
    misses: int
    evictions: int
    activations: int
    num_resident: int
    num_more: int
    used_elements: int
    largest_free_elements: int
    capacity_elements: int
    working_set_ratio: float
    host: HostTierStats

    @property
    def largest_free_ratio(self) -> float:
        """The longest free range as a share of all free elements: 1 means not fragmented."""
        free = self.capacity_elements - self.used_elements
        return self.largest_free_elements / free if free else 1.0
