"""Decides how many prompt tokens each request adds to a forward. Knows rows and tenants' accounts; knows no queue and
no blocks."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.queueing.fair_share import FairShare
from server.engine.request import Request
from server.engine.schedule import Schedule, SchedulerSettings
from server.engine.scheduling.flood_control import FloodControl


class ChunkedPrefill:
    """One per scheduler."""

    def __init__(self, settings: SchedulerSettings, shares: FairShare, flood: FloodControl) -> None:
        self._settings = settings
        self._shares = shares
        self._flood = flood

    def continue_prefills(self, schedule: Schedule, running: Sequence[Request]) -> list[Request]:
        """Add chunks of the prompts under way, the least served tenant first. While a less served tenant waits, half of
        the step is left to it, so one long prompt cannot take all. Returns the requests that may take what is left."""
        if schedule.num_decodes == len(running):
            return []
        prefills = [request for request in running if request.num_tokens - request.num_computed_tokens > 1]
        if len(prefills) > 1:
            prefills.sort(key=lambda request: self._shares.account(request.tenant).service)
        held_up: list[Request] = []
        lowest = self._shares.lowest()
        for request in prefills:
            limit = self._settings.tokens_per_step
            if lowest is not None and lowest.service < self._shares.account(request.tenant).service:
                limit //= 2
                held_up.append(request)
            self.add(schedule, request, limit)
        return held_up

    def add(self, schedule: Schedule, request: Request, limit: int | None = None) -> None:
        """Add as much of the prompt as `limit` tokens in the forward and its tenant's limit allow. A request that has a
        row already gets a longer one."""
        num_taken = schedule.num_chunk_tokens(request)
        most = self._flood.prompt_limit(schedule, self._shares.account(request.tenant))
        room = (most if limit is None else min(limit, most)) - schedule.num_tokens
        if self._settings.prefill_chunk is not None:
            room = min(room, self._settings.prefill_chunk - num_taken)
        count = min(request.num_tokens - request.num_computed_tokens - num_taken, room)
        if count > 0:
            schedule.add(request, count)
