"""Decides what tenants that ask for far more than their share leave out of a step, so that it stays short for everybody
else. Knows rows, tenants' accounts and how long steps took; knows no queue, no blocks and no tensors.

A flood may fill a server that nobody else wants. But the longer a step takes, the longer others' requests run and the
more of them there are: near a machine's limit a flood that takes all that is left makes everybody slow for good. So
those that run or wait with more than twice their part of the places together
- add prompt tokens to a step until it takes five times what it takes empty, or to their share of it, and
- while a tenant within its share computes a prompt in a step that is long already, decode only as many rows as are
  their part, and no prompt, unless the latest steps had less of theirs than their share (a deficit as in deficit round
  robin, Shreedhar and Varghese 1995) or they have nothing to decode.
Where those that flood are more than half of all, by weight, nobody is left to keep steps short for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set

from server.engine.fair_share import FairShare, TenantAccount
from server.engine.places import Places
from server.engine.schedule import Schedule, ScheduledRow, SchedulerSettings

_SLACK = 2.0  # times its part of the places: below, an even load's chance would count as a flood
_LONG = 4.0  # times the fixed part's tokens: how long prompts of a flood make a step
_SHORT = 2.0  # a step in which nothing is left out: where tokens cost little, that would be for nothing
_MOST_CREDIT = 100.0
_MOST_SHARE = 0.5
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
        self._flooding: Set[str] = frozenset()
        self._share = 0.0  # of those that flood, together
        self._credit = 0.0  # tokens: of their share of the latest steps, what these did not have

    def begin(self, now_s: float) -> None:
        """A step is about to be chosen."""
        self._now_s = self._begun_s = now_s
        flooding = [account for account in self._places.holders() if self._asks_for_too_much(account)]
        self._share = sum(self._shares.share_of(account, now_s) for account in flooding)
        is_flooded = 0.0 < self._share <= _MOST_SHARE
        self._flooding = {account.tenant for account in flooding} if is_flooded else frozenset()

    def ran(self, schedule: Schedule, now_s: float) -> None:
        """The step is over. Where it was under way before the last one was over, that is when it began."""
        self._cost.observe(schedule.num_tokens, now_s - self._begun_s)
        self._begun_s = now_s
        if not self._flooding:
            self._credit = 0.0
        elif (tokens := self._cost.tokens_of_fixed) is not None:
            owed = self._credit + self._share * schedule.num_tokens - self._num_tokens_of_flood(schedule.rows)
            most = _MOST_CREDIT * tokens
            self._credit = max(-most, min(most, owed))

    def prompt_limit(self, schedule: Schedule, account: TenantAccount) -> int:
        """How many tokens the forward may hold once a prompt of this tenant is in it."""
        limit, tokens = self._settings.max_batch_tokens, self._cost.tokens_of_fixed
        if account.tenant not in self._flooding or tokens is None:
            return limit
        num_taken = self._num_tokens_of_flood(schedule.rows)
        num_within = schedule.num_tokens - num_taken
        share = num_within * self._share / (1.0 - self._share) + self._credit
        allowance = max(_LONG * tokens - num_within, share) - num_taken
        return min(limit, schedule.num_tokens + max(0 if num_taken else 1, int(allowance)))

    def leave_out(self, schedule: Schedule) -> None:
        """Take what is beyond a share out of a forward in which a tenant within its share computes a prompt."""
        if not self._flooding:
            return
        chunks = schedule.rows[schedule.num_decodes :]
        if all(self._is_of_flood(row) for row in chunks) or self._is_short(schedule):
            return
        decodes = self._decodes_within(schedule.rows[: schedule.num_decodes])
        decoding = {row.request.tenant for row in decodes}  # who has no such row would stand still
        if self._credit <= 0.0:
            chunks = [row for row in chunks if not self._is_of_flood(row) or row.request.tenant not in decoding]
        schedule.rows = decodes + chunks
        schedule.num_decodes = len(decodes)
        schedule.num_tokens = sum(row.num_tokens for row in schedule.rows)

    def _is_short(self, schedule: Schedule) -> bool:
        tokens = self._cost.tokens_of_fixed
        return tokens is None or schedule.num_tokens <= _SHORT * tokens

    def _decodes_within(self, decodes: list[ScheduledRow]) -> list[ScheduledRow]:
        """Of each tenant that floods the rows admitted first, as many as are its part."""
        counts: Counter[str] = Counter()
        kept: list[ScheduledRow] = []
        for row in decodes:
            if self._is_of_flood(row):
                tenant = row.request.tenant
                counts[tenant] += 1
                if counts[tenant] > max(1, int(self._part_of(self._shares.account(tenant)))):
                    continue
            kept.append(row)
        return kept

    def _num_tokens_of_flood(self, rows: Sequence[ScheduledRow]) -> int:
        return sum(row.num_tokens for row in rows if self._is_of_flood(row))

    def _is_of_flood(self, row: ScheduledRow) -> bool:
        return row.request.tenant in self._flooding

    def _asks_for_too_much(self, account: TenantAccount) -> bool:
        count = account.num_running + account.num_waiting
        return count > _SLACK and count > _SLACK * self._part_of(account)

    def _part_of(self, account: TenantAccount) -> float:
        """Of the places."""
        return self._places.part_of(account, self._now_s)
