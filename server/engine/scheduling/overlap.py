"""Decides whether the forward after the one under way can be scheduled already (overlap scheduling), and on which rows.
Knows rows and blocks; knows no queue, no tensors and no clock.

The next forward can be scheduled early if four things hold: every running request is decoding; no waiting request could
be admitted; every row that will certainly continue has a KV block without preemption; and none outgrows its keys.
"""

from __future__ import annotations

from server.engine.schedule import Schedule, ScheduledRow
from server.engine.scheduling.block_pool import BlockPool

MAX_AHEAD_WHILE_WAITING = 16  # steps: some reasons to keep a request waiting pass with time alone


class Overlap:
    """One per scheduler. The state is the tuple (slot changes, arrivals, activations): while it equals that of the last
    full schedule, another pass through the queue would admit no request."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._last_state: tuple[int, int, int] | None = None
        self._num_since_schedule = 0

    def note_schedule(self, state: tuple[int, int, int]) -> None:
        """A full schedule has been made in this state."""
        self._last_state, self._num_since_schedule = state, 0

    def after(self, schedule: Schedule, state: tuple[int, int, int], *, has_waiting: bool) -> Schedule | None:
        """The forward after `schedule`, whose tokens are not known yet: the next token of each row that will certainly
        continue. None: it cannot be decided yet. Allocates the block each row needs."""
        if schedule.num_decodes < len(schedule.rows):
            return None
        self._num_since_schedule += 1
        continuing = [row for row in schedule.rows if not _ends(row)]
        if has_waiting:
            frees_slot = len(continuing) < len(schedule.rows)
            if frees_slot or state != self._last_state or self._num_since_schedule > MAX_AHEAD_WHILE_WAITING:
                return None
        if any(row.start + 2 in self._pool.outgrown_at for row in continuing):
            return None
        if not continuing or not self._give_blocks(continuing):
            return None
        rows = [ScheduledRow(row.request, row.start + 1, 1) for row in continuing]
        return Schedule(rows, len(rows), len(rows))

    def _give_blocks(self, rows: list[ScheduledRow]) -> bool:
        size = self._pool.block_size
        short = [row.request for row in rows if len(row.request.block_ids) * size < row.start + 2]
        if len(short) > self._pool.num_free:
            return False
        for request in short:
            request.block_ids += self._pool.allocate(1)
        return True


def _ends(row: ScheduledRow) -> bool:
    """Whether the token being sampled is certainly the request's last."""
    return len(row.request.output_ids) + 1 >= row.request.params.max_tokens
