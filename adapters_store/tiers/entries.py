"""What writing adapters to a device means, whatever the device. No implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from adapters_store.packed.layout import PackedAdapter


class CopyHandle(Protocol):
    """One copy under way."""

    def done(self) -> bool:
        """Whether bytes and table row are in place for every later forward."""


class DeviceCopier(Protocol):
    """Writes the device's arena and adapter table."""

    def start(self, slot: int, offset: int, adapter: PackedAdapter) -> CopyHandle:
        """Begin copying the buffer to arena elements offset.. and write the table row. Does not wait."""

    def move(self, slot: int, source: int, target: int, num_elements: int) -> CopyHandle:
        """Begin copying the slot's adapter within the arena, down from `source` to `target`, and let the table row name
        its new place. Both places may overlap. Does not wait."""

    def clear(self, slot: int) -> None:
        """Table row back to "no adapter"."""
