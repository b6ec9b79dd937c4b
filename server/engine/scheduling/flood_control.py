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
from collections.abc import Set

from server.engine.queueing.fair_share import FairShare, TenantAccount
from server.engine.schedule import Schedule, ScheduledRow, SchedulerSettings
from server.engine.scheduling.preemption import Places

_SLACK = 2.0  # times its part of the places: below, an even load's chance would count as a flood
_LONG = 4.0  # times an empty step: how much longer prompts of a flood make one
_SHORT = 2.0  # a step in which nothing is left out: where tokens cost little, that would be for nothing
_MOST_CREDIT = 100.0
_MOST_SHARE = 0.5
_DECAY = 0.998  # of a step's weight in the fit with each further step: 500 count
_LEAST_DEVIATION = 4.0  # rows or tokens: steps more alike than this say nothing about what one costs
_MOST_ALIKE = 0.95  # of squared correlation: beyond, rows and tokens are not told apart


class StepCost:
    """What an empty step, a decode row and a prompt's token take: least squares over the latest steps, older ones
    counting less. Told apart, because a row costs more than a token, and rows are in every step: a line through tokens
    alone would take them for a part of the empty step."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._sums = [0.0] * 8  # of d, p, s, dd, dp, pp, ds, ps: decode rows, prompt tokens, seconds
        self.empty_s: float | None = None  # None: not known
        self.row_s = self.token_s = 0.0

    def observe(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """One step: its decode rows and its prompts' tokens."""
        d, p, s = num_rows, num_tokens, seconds
        self._weight = self._weight * _DECAY + 1.0
        latest = (d, p, s, d * d, d * p, p * p, d * s, p * s)
        self._sums = [old * _DECAY + new for old, new in zip(self._sums, latest, strict=True)]
        self._fit()

    def of(self, num_rows: float, num_tokens: float) -> float:
        """Seconds that they add to a step."""
        return self.row_s * num_rows + self.token_s * num_tokens

    def _fit(self) -> None:
        d, p, s, dd, dp, pp, ds, ps = (total / self._weight for total in self._sums)
        dd, dp, pp, ds, ps = dd - d * d, dp - d * p, pp - p * p, ds - d * s, ps - p * s
        least, both = _LEAST_DEVIATION**2, dd + 2 * dp + pp
        if dd >= least and pp >= least and dp * dp <= _MOST_ALIKE * dd * pp:
            apart = dd * pp - dp * dp
            self.row_s, self.token_s = (ds * pp - ps * dp) / apart, (ps * dd - ds * dp) / apart
        elif both >= least:
            self.row_s = self.token_s = (ds + ps) / both
        else:
            return  # the last answer stands
        self.row_s, self.token_s = max(0.0, self.row_s), max(0.0, self.token_s)
        self.empty_s = max(0.0, s - self.of(d, p))


class OverShare:
    """One scheduler's. `begin` opens a step; what it says holds for that step."""

    def __init__(self, settings: SchedulerSettings, shares: FairShare, places: Places) -> None:
        self._settings = settings
        self._shares = shares
        self._places = places
        self._cost = StepCost()
        self._now_s = 0.0
        self._begun_s = 0.0
        self.flooding: Set[str] = frozenset()  # tenants
        self._share = 0.0  # of those that flood, together
        self._credit_s = 0.0  # of their share of the latest steps, what these did not have

    def begin(self, now_s: float) -> None:
        """A step is about to be chosen."""
        self._now_s = self._begun_s = now_s
        flooding = [account for account in self._places.holders() if self._asks_for_too_much(account)]
        self._share = sum(self._shares.share_of(account, now_s) for account in flooding)
        is_flooded = 0.0 < self._share <= _MOST_SHARE
        self.flooding = {account.tenant for account in flooding} if is_flooded else frozenset()

    def ran(self, schedule: Schedule, now_s: float) -> None:
        """The step is over. Where it was under way before the last one was over, that is when it began."""
        num_decodes = schedule.num_decodes
        self._cost.observe(num_decodes, schedule.num_tokens - num_decodes, now_s - self._begun_s)
        self._begun_s = now_s
        if not self.flooding:
            self._credit_s = 0.0
        elif self._cost.empty_s is not None:
            flood_s, within_s = self._split(schedule)
            most_s = _MOST_CREDIT * self._cost.empty_s
            owed_s = self._credit_s + self._share * (flood_s + within_s) - flood_s
            self._credit_s = max(-most_s, min(most_s, owed_s))

    def prompt_limit(self, schedule: Schedule, account: TenantAccount) -> int:
        """How many tokens the forward may hold once a prompt of this tenant is in it."""
        limit, cost = self._settings.max_batch_tokens, self._cost
        if account.tenant not in self.flooding or cost.empty_s is None or not cost.token_s:
            return limit
        flood_s, within_s = self._split(schedule)
        share_s = within_s * self._share / (1.0 - self._share) + self._credit_s
        room_s = max(_LONG * cost.empty_s - within_s, share_s) - flood_s
        num_tokens = int(min(limit, max(0.0, room_s) / cost.token_s))
        return min(limit, schedule.num_tokens + max(0 if flood_s else 1, num_tokens))

    def leave_out(self, schedule: Schedule) -> None:
        """Take what is beyond a share out of a forward in which a tenant within its share computes a prompt."""
        if not self.flooding:
            return
        chunks = schedule.rows[schedule.num_decodes :]
        if all(self._is_of_flood(row) for row in chunks) or self._is_short(schedule):
            return
        decodes = self._decodes_within(schedule.rows[: schedule.num_decodes])
        decoding = {row.request.tenant for row in decodes}  # who has no such row would stand still
        if self._credit_s <= 0.0:
            chunks = [row for row in chunks if not self._is_of_flood(row) or row.request.tenant not in decoding]
        schedule.rows = decodes + chunks
        schedule.num_decodes = len(decodes)
        schedule.num_tokens = sum(row.num_tokens for row in schedule.rows)

    def _is_short(self, schedule: Schedule) -> bool:
        cost, num_decodes = self._cost, schedule.num_decodes
        if cost.empty_s is None:
            return True
        return cost.of(num_decodes, schedule.num_tokens - num_decodes) <= _SHORT * cost.empty_s

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

    def _split(self, schedule: Schedule) -> tuple[float, float]:
        """Seconds that those that flood add to this step, and that the others do."""
        num_decodes = schedule.num_decodes
        num_rows = sum(self._is_of_flood(row) for row in schedule.rows[:num_decodes])
        num_tokens = sum(row.num_tokens for row in schedule.rows[num_decodes:] if self._is_of_flood(row))
        flood_s = self._cost.of(num_rows, num_tokens)
        return flood_s, self._cost.of(num_decodes, schedule.num_tokens - num_decodes) - flood_s

    def _is_of_flood(self, row: ScheduledRow) -> bool:
        return row.request.tenant in self.flooding

    def _asks_for_too_much(self, account: TenantAccount) -> bool:
        count = account.num_running + account.num_waiting
        return count > _SLACK and count > _SLACK * self._part_of(account)

    def _part_of(self, account: TenantAccount) -> float:
        """Of the places."""
        return self._places.part_of(account, self._now_s)
