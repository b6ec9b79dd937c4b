"""Adapters on their way to the device. Decides how many are copied at once, and when one has arrived. Knows neither
which adapters are wanted nor why a range was chosen. One engine thread owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from adapters_store.base.description import AdapterDigest
from adapters_store.tiers.device_pool import DevicePool
from adapters_store.tiers.entries import DeviceCopier, HostEntry, IsCopied, Owner, PoolEntry
from adapters_store.tiers.host_tier import HostTier

if TYPE_CHECKING:
    from adapters_store.packed.layout import PackedAdapter


class _Transfer(NamedTuple):
    """source: what the copy reads, pinned in host memory until it is done."""

    entry: PoolEntry
    source: HostEntry
    is_copied: IsCopied


class Transfers:
    """Copies under way. max_copies: at most this many at once, and as many started between two `begin()`.

    arrived: called for each entry that has become ready, also from within `copy`.
    """

    def __init__(
        self,
        host: HostTier,
        pool: DevicePool,
        copier: DeviceCopier,
        max_copies: int,
        arrived: Callable[[PoolEntry], None],
    ) -> None:
        self._host = host
        self._pool = pool
        self._copier = copier
        self._max_copies = max_copies
        self._arrived = arrived
        self._under_way: dict[AdapterDigest, _Transfer] = {}
        self._starts_left = max_copies
        self._loads: list[tuple[Owner, int]] = []  # since take_loads()

    def __len__(self) -> int:
        """Number of copies under way."""
        return len(self._under_way)

    @property
    def may_start(self) -> bool:
        return self._starts_left > 0

    def begin(self) -> None:
        """Start a step: finish the copies that are done."""
        for transfer in [transfer for transfer in self._under_way.values() if transfer.is_copied()]:
            self._finish(transfer)
        self._starts_left = max(0, self._max_copies - len(self._under_way))

    def take_loads(self) -> Sequence[tuple[Owner, int]]:
        """Copies begun since the last call: their owner, and how many elements."""
        if not self._loads:
            return ()
        loads, self._loads = self._loads, []
        return loads

    def copy(self, entry: PoolEntry, evicted: Iterable[PoolEntry], adapter: PackedAdapter) -> None:
        """Copy from host memory to a range just reserved, from which `evicted` were removed."""
        for victim in evicted:
            self._copier.clear(victim.slot)
        self._starts_left -= 1
        self._loads.append((entry.owner, entry.num_elements))
        source = self._host.pin(adapter)
        transfer = _Transfer(entry, source, self._copier.start(entry.slot, entry.offset, adapter))
        self._under_way[entry.digest] = transfer
        if transfer.is_copied():
            self._finish(transfer)

    def _finish(self, transfer: _Transfer) -> None:
        del self._under_way[transfer.entry.digest]
        self._host.unpin(transfer.source)
        self._pool.mark_ready(transfer.entry)
        self._arrived(transfer.entry)
