"""The nouns of adapter memory: an adapter's owner, its range on the device, and the copy to it. No decisions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple, Protocol

from adapters_store.base.description import AdapterDigest

if TYPE_CHECKING:
    from adapters_store.packed.layout import PackedAdapter


class Owner(NamedTuple):
    """The tenant an adapter is loaded for. weight: the tenant's share next to the others'."""

    tenant: str
    weight: float = 1.0


NO_OWNER = Owner("")  # outside a server with tenants: one owner, whose share is everything


class EntryState(Enum):
    COPYING = auto()
    READY = auto()


@dataclass(slots=True, eq=False)
class PoolEntry:
    """One adapter's range in the arena. It is not removed while it is in use, pinned or being copied."""

    digest: AdapterDigest
    slot: int
    offset: int
    num_elements: int
    last_used_s: float
    owner: Owner = NO_OWNER
    state: EntryState = EntryState.COPYING
    ref_count: int = 0
    pinned: bool = False
    was_used: bool = False
    doomed: bool = False  # its adapter was deleted: it is removed as soon as no request uses it

    @property
    def is_evictable(self) -> bool:
        return self.ref_count == 0 and self.state is EntryState.READY and not self.pinned


class Reservation(NamedTuple):
    """A range for a new adapter, and the entries evicted for it (their slots are free or reused)."""

    entry: PoolEntry
    evicted: tuple[PoolEntry, ...]


class CopyHandle(Protocol):
    """One copy under way."""

    def done(self) -> bool:
        """Whether bytes and table row are in place for every later forward."""


class DeviceCopier(Protocol):
    """Writes the device's arena and adapter table."""

    def start(self, slot: int, offset: int, adapter: PackedAdapter) -> CopyHandle:
        """Begin copying the buffer to arena elements offset.. and write the table row. Does not wait."""

    def clear(self, slot: int) -> None:
        """Set the table row back to "no adapter"."""
