"""Decides how many prompt tokens each request adds to a forward. Knows rows and tenants' accounts; knows no queue and
no blocks."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.queueing.fair_share import FairShare
from server.engine.request import Request
from server.engine.schedule import Schedule, SchedulerSettings
from server.engine.scheduling.flood_control import OverShare


class PromptChunks:
    """One scheduler's."""

    def __init__(self, settings: SchedulerSettings, shares: FairShare, over_share: OverShare) -> None:
        self._settings = settings
        self._shares = shares
        self._over_share = over_share

    def go_on(self, schedule: Schedule, running: Sequence[Request]) -> list[Request]:
        """More of the prompts under way. The tenant that has been given least goes first. While one waits that has been
        given less, half of the step is left to it: another's long prompt does not take all. Returns whose chunks may
        take what is left over."""
        if schedule.num_decodes == len(running):
            return []
        prefills = [request for request in running if request.num_tokens - request.num_computed_tokens > 1]
        if len(prefills) > 1:
            prefills.sort(key=lambda request: self._shares.account(request.tenant).service)
        held_up: list[Request] = []
        lowest = self._shares.lowest()
        for request in prefills:
            limit = self._settings.max_batch_tokens
            if lowest is not None and lowest.service < self._shares.account(request.tenant).service:
                limit //= 2
                held_up.append(request)
            self.add(schedule, request, limit)
        return held_up

    def add(self, schedule: Schedule, request: Request, limit: int | None = None) -> None:
        """As much of the prompt as keeps the forward within `limit` tokens and what its tenant may add; more of it
        where it has a row already."""
        num_taken = schedule.num_chunk_tokens(request)
        most = self._over_share.prompt_limit(schedule, self._shares.account(request.tenant))
        room = (most if limit is None else min(limit, most)) - schedule.num_tokens
        if self._settings.prefill_chunk is not None:
            room = min(room, self._settings.prefill_chunk - num_taken)
        count = min(request.num_tokens - request.num_computed_tokens - num_taken, room)
        if count > 0:
            schedule.add(request, count)
