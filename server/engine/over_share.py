"""Decides what tenants beyond their share leave out of a step, so that it stays short for whoever begins in it. Knows
rows, tenants' accounts and how long steps took; knows no queue, no blocks and no tensors.

A flood may fill a server that nobody else wants. But a step with its sixty rows and its prompts takes several times as
long as an even load's, and a newcomer waits for one such step and computes its prompt in the next. Therefore a tenant
that runs more than twice its part of the places
- adds no more prompt tokens to a step than take three times what a step costs before its first token, and
- while a tenant within its share computes a prompt, decodes only as many rows as are its part, and no prompt,
  unless it has nothing to decode.
"""

from __future__ import annotations

from collections import Counter

from server.engine.fair_share import FairShare, TenantAccount
from server.engine.places import Places
from server.engine.schedule import Schedule, ScheduledRow, SchedulerSettings

_SLACK = 2.0  # times its part of the places: below, an even load's chance would count as a flood
_FIXED_COSTS = 3.0  # more gives the flood a little more, and others wait for longer (docs/log.md)
_LEAST_PART = 1 / 16  # of max_batch_tokens: what is left to prompts beyond a share, however dear a token is
_DECAY = 0.98  # of a step's weight in the fit with each further step
_LEAST_DEVIATION = 4.0  # tokens: steps more alike than this say nothing about what a token costs


class StepCost:
    """How a step's time follows from its tokens: a line through the latest steps, older ones counting less."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._tokens_of_fixed: float | None = None

    def observe(self, num_tokens: int, seconds: float) -> None:
        """One step."""
        self._weight = self._weight * _DECAY + 1.0
        self._x = self._x * _DECAY + num_tokens
        self._y = self._y * _DECAY + seconds
        self._xx = self._xx * _DECAY + num_tokens * num_tokens
        self._xy = self._xy * _DECAY + num_tokens * seconds

    @property
    def tokens_of_fixed(self) -> float | None:
        """How many tokens take as long as a step's fixed part; None: not known, or tokens seem to cost nothing."""
        if not self._weight:
            return None
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        if variance >= _LEAST_DEVIATION**2:
            slope = (self._xy / self._weight - mean_x * mean_y) / variance
            self._tokens_of_fixed = None if slope <= 0.0 else max(0.0, mean_y / slope - mean_x)
        return self._tokens_of_fixed


class OverShare:
    """One scheduler's. `begin` opens a step; what it says holds for that step."""

    def __init__(self, settings: SchedulerSettings, shares: FairShare, places: Places) -> None:
        self._settings = settings
        self._shares = shares
        self._places = places
        self._cost = StepCost()
        self._now_s = 0.0
        self._begun_s = 0.0
        self._is_any_over = False

    def begin(self, now_s: float) -> None:
        """A step is about to be chosen."""
        self._now_s = self._begun_s = now_s
        fullest = self._places.fullest()
        self._is_any_over = fullest is not None and self._runs_too_much(fullest)

    def ran(self, schedule: Schedule, now_s: float) -> None:
        """The step is over. Where it was under way before the last one was over, that is when it began."""
        self._cost.observe(schedule.num_tokens, now_s - self._begun_s)
        self._begun_s = now_s

    def prompt_limit(self, schedule: Schedule, account: TenantAccount) -> int:
        """How many tokens the forward may hold once a prompt of this tenant is in it."""
        limit = self._settings.max_batch_tokens
        if not self._is_over(account):
            return limit
        chunks = schedule.rows[schedule.num_decodes :]
        num_taken = sum(row.num_tokens for row in chunks if self._is_over(self._account_of(row)))
        return min(limit, schedule.num_tokens + max(0, self._allowance() - num_taken))

    def leave_out(self, schedule: Schedule) -> None:
        """Take what is beyond a share out of a forward in which a tenant within its share computes a prompt."""
        if not self._is_any_over:
            return
        chunks = [(row, self._is_over(self._account_of(row))) for row in schedule.rows[schedule.num_decodes :]]
        if all(is_over for _, is_over in chunks):
            return
        decodes = self._decodes_within(schedule.rows[: schedule.num_decodes])
        decoding = {row.request.tenant for row in decodes}  # who has no such row would stand still
        kept = [row for row, is_over in chunks if not is_over or row.request.tenant not in decoding]
        schedule.rows = decodes + kept
        schedule.num_decodes = len(decodes)
        schedule.num_tokens = sum(row.num_tokens for row in schedule.rows)

    def _decodes_within(self, decodes: list[ScheduledRow]) -> list[ScheduledRow]:
        """Of each tenant beyond its share the rows admitted first, as many as are its part."""
        counts: Counter[str] = Counter()
        kept: list[ScheduledRow] = []
        for row in decodes:
            account = self._account_of(row)
            counts[account.tenant] += 1
            if not self._is_over(account) or counts[account.tenant] <= max(1, int(self._part_of(account))):
                kept.append(row)
        return kept

    def _allowance(self) -> int:
        limit = self._settings.max_batch_tokens
        tokens = self._cost.tokens_of_fixed
        return limit if tokens is None else min(limit, int(max(1.0, _LEAST_PART * limit, _FIXED_COSTS * tokens)))

    def _is_over(self, account: TenantAccount) -> bool:
        return self._is_any_over and self._runs_too_much(account)

    def _runs_too_much(self, account: TenantAccount) -> bool:
        return account.num_running > _SLACK * self._part_of(account)

    def _part_of(self, account: TenantAccount) -> float:
        """Of the places."""
        return self._places.part_of(account, self._now_s)

    def _account_of(self, row: ScheduledRow) -> TenantAccount:
        return self._shares.account(row.request.tenant)
