"""Decides whose time is up. Knows ids and moments; knows no queue."""

from __future__ import annotations

from heapq import heappop, heappush


class Deadlines:
    """Asking costs nothing while nobody is late. Whoever ended in time is named all the same when its moment comes."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []

    def watch(self, request_id: str, deadline_s: float) -> None:
        """deadline_s: in seconds of the caller's clock."""
        heappush(self._heap, (deadline_s, request_id))

    def take_late(self, now_s: float) -> list[str]:
        """Ids whose deadline has passed, each once."""
        late: list[str] = []
        while self._heap and self._heap[0][0] <= now_s:
            late.append(heappop(self._heap)[1])
        return late
