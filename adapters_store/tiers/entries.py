"""The nouns of adapter memory: an adapter's owner, its place in host memory, its range on the device, and the copy to
it. No decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import StoreError

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
    is_deleted: bool = False  # removed as soon as no request uses it

    @property
    def is_evictable(self) -> bool:
        return self.ref_count == 0 and self.state is EntryState.READY and not self.pinned


@dataclass(slots=True, eq=False)
class HostEntry:
    """One adapter in host memory. While `pins` > 0 a copy reads its buffer and it is not evicted."""

    adapter: PackedAdapter
    pins: int = 0
    was_used: bool = False


class Reservation(NamedTuple):
    """A range for a new adapter, and the entries evicted for it (their slots are free or reused)."""

    entry: PoolEntry
    evicted: tuple[PoolEntry, ...]


class Residency(NamedTuple):
    """Where an adapter is now: "device", "loading" (on its way there), "host" or "disk"; and whether it is pinned."""

    state: str
    pinned: bool


class AdapterSnapshot(NamedTuple):
    """Adapter memory after a poll or an update, as the scheduler sees it until the next one.

    ready: adapters whose slot acquire() gives now. It is a live view: a deleted adapter leaves it with its last user.
    num_activations: rises whenever an adapter becomes ready.
    loads: copies to the device begun since the last poll: their owner, and how many elements. Set by a poll.
    failures: wanted adapters that cannot be loaded. Set by an update.
    no_room_since: wanted adapters in host memory that find no room on the device, and since when (clock seconds).
    over_share: of these, adapters whose own tenant has used up its share, so that it must make the room itself.
    over_share_tenants: tenants whose running requests use more of the device than their share, while an adapter of a
        tenant within its share finds no room.
    """

    ready: Collection[AdapterDigest] = ()
    num_activations: int = 0
    loads: Sequence[tuple[Owner, int]] = ()
    failures: Mapping[AdapterDigest, StoreError] = MappingProxyType({})
    no_room_since: Mapping[AdapterDigest, float] = MappingProxyType({})
    over_share: Collection[AdapterDigest] = ()
    over_share_tenants: Collection[str] = ()


IsCopied = Callable[[], bool]
"""Of one copy under way: whether bytes and table row are in place for every later forward."""


class DeviceCopier(Protocol):
    """Writes the device's arena and adapter table."""

    def start(self, slot: int, offset: int, adapter: PackedAdapter) -> IsCopied:
        """Begin copying the buffer to arena elements offset.. and write the table row. Does not wait."""

    def clear(self, slot: int) -> None:
        """Set the table row back to "no adapter"."""
