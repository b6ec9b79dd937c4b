"""Decides whether an upload may start and continue: slots by tenant, disk space that running uploads have claimed, and
a minimum speed. Knows no form and no adapter. Safe to use from many threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adapters_store.errors import StoreError
from server.api.wire.errors import ApiError

OWN_SLOTS = 2  # of every tenant, also when other tenants use all shared ones


class Incoming:
    """One running upload. num_claimed: bytes that it announced and that have not arrived."""

    def __init__(self, slots: UploadSlots, tenant: str, start_s: float) -> None:
        self.tenant = tenant
        self.num_claimed = 0
        self._slots = slots
        self._start_s = start_s
        self._num_bytes = 0

    def claim(self, num_bytes: int) -> None:
        """The upload announces num_bytes. Raises StoreError disk_full if they do not fit beside other claims."""
        self._slots.check_room(self._slots.num_claimed + num_bytes)
        self.num_claimed = num_bytes

    def arrived(self, num_bytes: int) -> None:
        """num_bytes more have arrived, not written yet.

        Raises StoreError disk_full if they would use the disk's reserve, ApiError 408 if the client is too slow.
        """
        of_others = self._slots.num_claimed if num_bytes > self.num_claimed else 0
        self._slots.check_room(of_others + num_bytes)
        self.num_claimed = max(0, self.num_claimed - num_bytes)
        self._num_bytes += num_bytes
        self._slots.check_speed(self._num_bytes, since_s=self._start_s)


class UploadSlots:
    """max_uploads: shared by all tenants; a tenant below OWN_SLOTS gets one beyond them, up to as many again.

    has_room: whether that many more bytes leave the disk's reserve free. min_bytes_per_s: on average, once an upload
    has lasted grace_s.
    """

    def __init__(
        self,
        max_uploads: int,
        has_room: Callable[[int], bool],
        *,
        min_bytes_per_s: float,
        grace_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_uploads = max_uploads
        self._has_room = has_room
        self._min_bytes_per_s = min_bytes_per_s
        self._grace_s = grace_s
        self._clock = clock
        self._lock = threading.Lock()
        self._running: set[Incoming] = set()

    @property
    def num_claimed(self) -> int:
        """Bytes that running uploads have announced and that have not arrived."""
        with self._lock:
            return sum(incoming.num_claimed for incoming in self._running)

    @contextmanager
    def taken(self, tenant: str) -> Iterator[Incoming]:
        """A slot for the length of the block. Raises ApiError 429 if no slot is free for this tenant."""
        incoming = Incoming(self, tenant, self._clock())
        with self._lock:
            self._check_free(tenant)
            self._running.add(incoming)
        try:
            yield incoming
        finally:
            with self._lock:
                self._running.discard(incoming)

    def check_room(self, num_bytes: int) -> None:
        """Raises StoreError disk_full if num_bytes more would use the reserve."""
        if not self._has_room(num_bytes):
            message = f"no room for {num_bytes} bytes of uploads above the disk's reserve; nothing was stored"
            raise StoreError("disk_full", message)

    def check_speed(self, num_bytes: int, *, since_s: float) -> None:
        """Raises ApiError 408 if num_bytes are too few for the time."""
        lasted_s = self._clock() - since_s
        if num_bytes < self._min_bytes_per_s * (lasted_s - self._grace_s):
            message = (
                f"the upload sent {num_bytes} bytes in {lasted_s:.0f} s; it must send {self._min_bytes_per_s:g} bytes "
                f"per second after its first {self._grace_s:g} s"
            )
            raise ApiError(408, "upload_too_slow", message, headers={"connection": "close"})

    def _check_free(self, tenant: str) -> None:
        num_own = sum(incoming.tenant == tenant for incoming in self._running)
        num_all, limit = len(self._running), self._max_uploads
        if num_all < limit or (num_own < OWN_SLOTS and num_all < 2 * limit):
            return
        message = f"{num_all} uploads are in progress, {num_own} of them yours; the limit is {limit}. Try again later."
        raise ApiError(429, "too_many_uploads", message, retry_after_s=2.0)
