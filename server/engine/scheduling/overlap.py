"""Decides whether the forward after the one under way can be chosen already, and on which rows. Knows rows and blocks;
knows no queue, no tensors and no clock.

It can where it follows from the one under way alone: every running request decodes in it, nobody who waits could be
admitted, each row that surely goes on finds its block without preempting anybody, and none outgrows its keys.
"""

from __future__ import annotations

from server.engine.schedule import Schedule, ScheduledRow
from server.engine.scheduling.block_pool import BlockPool

MAX_AHEAD_WHILE_WAITING = 16  # steps: some of what keeps a request waiting passes with time alone


class LookAhead:
    """One scheduler's. A state says who runs, who has come and which adapters have: while it is that of the last full
    look at the queue, another look would admit nobody."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._last_look: object = None
        self._num_since_look = 0

    def looked(self, state: object) -> None:
        """The queue has been gone through."""
        self._last_look, self._num_since_look = state, 0

    def after(self, schedule: Schedule, state: object, *, is_anyone_waiting: bool) -> Schedule | None:
        """The forward after `schedule`, whose tokens are not known: the next token of each row that surely goes on.
        None: the next forward cannot be told yet. Gives each of its rows the block it needs."""
        if schedule.num_decodes < len(schedule.rows):
            return None
        self._num_since_look += 1
        going_on = [row for row in schedule.rows if not _ends(row)]
        if is_anyone_waiting:
            opens_place = len(going_on) < len(schedule.rows)
            if opens_place or state != self._last_look or self._num_since_look > MAX_AHEAD_WHILE_WAITING:
                return None
        if any(row.start + 2 in self._pool.outgrown_at for row in going_on):
            return None
        if not going_on or not self._give_blocks(going_on):
            return None
        return Schedule([ScheduledRow(row.request, row.start + 1, 1) for row in going_on], len(going_on), len(going_on))

    def _give_blocks(self, rows: list[ScheduledRow]) -> bool:
        size = self._pool.block_size
        short = [row.request for row in rows if len(row.request.block_ids) * size < row.start + 2]
        if len(short) > self._pool.num_free:
            return False
        for request in short:
            request.block_ids += self._pool.allocate(1)
        return True


def _ends(row: ScheduledRow) -> bool:
    """Whether the token that is being sampled is the request's last, whatever it is."""
    return len(row.request.output_ids) + 1 >= row.request.params.max_tokens
