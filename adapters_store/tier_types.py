"""The nouns of adapter memory: its settings, its counters, and what lies on the device. No decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from adapters_store.base import AdapterDigest
from adapters_store.device_pool import EntryState
from adapters_store.host_tier import HostTierStats


@dataclass(frozen=True, kw_only=True)
class AdapterTiersSettings:
    """max_copies: copies under way at once, and started between two polls at most: bounds what one step pays.

    max_loads: loads asked of the host tier at once, so that what is wanted first later is not queued behind the rest.
    recheck_s: how often what is wanted and missing is looked at again when nothing has changed.
    """

    max_copies: int = 2
    max_loads: int = 8
    recheck_s: float = 0.05

    def __post_init__(self) -> None:
        for name in ("max_copies", "max_loads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class AdapterTiersStats:
    """misses: times an adapter was newly wanted and was not on the device. working_set_ratio: what was used in the last
    minute, as a share of the device's capacity. The rest as in the tiers' own stats."""

    hits: int
    misses: int
    evictions: int
    activations: int
    num_resident: int
    used_elements: int
    capacity_elements: int
    working_set_ratio: float
    host: HostTierStats


class ResidentAdapter(NamedTuple):
    """One adapter on the device."""

    digest: AdapterDigest
    slot: int
    num_elements: int
    ref_count: int
    pinned: bool
    state: EntryState
