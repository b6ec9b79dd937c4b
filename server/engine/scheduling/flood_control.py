"""Decides what noisy tenants, which ask for far more than their share, give up of a step, so that it stays short for
the others. Knows rows, tenants' accounts and how long steps took; knows no queue, no blocks and no tensors.

A noisy tenant may fill a server that no other tenant wants. But longer steps make others' requests run longer, so more
of them run at once. Near a machine's limit, a tenant that takes all that is left makes all others slow for good.
Tenants that run or wait with more than twice their share of the running slots are noisy. Together
- they add prompt tokens to a step until it takes five times as long as an empty one, or up to their share of it;
- while another tenant computes a prompt in a step that is long already, they decode only as many rows as their share,
  and no prompt. They may add prompts if the latest steps gave them less than their share (a deficit as in deficit round
  robin, Shreedhar and Varghese 1995), or if they have nothing to decode.
If noisy tenants are more than half of all, by weight, nothing is skipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set

from server.engine.queueing.fair_share import FairShare, TenantAccount
from server.engine.schedule import Schedule, ScheduledRow, SchedulerSettings
from server.engine.scheduling.preemption import RunningSlots

_SLACK = 2.0  # times its share of the slots: less, and chance under an even load would count as noise
_LONG = 4.0  # times an empty step: how much longer prompts of noisy tenants may make one
_SHORT = 2.0  # times an empty step: nothing is skipped in a shorter one, as it would gain little
_MOST_CREDIT = 100.0
_MOST_SHARE = 0.5
_DECAY = 0.998  # of a step's weight in the fit with each further step: 500 count
_LEAST_DEVIATION = 4.0  # rows or tokens: steps more alike than this do not show what one costs
_MOST_ALIKE = 0.95  # of squared correlation: beyond it, rows and tokens cannot be told apart


class StepCost:
    """What an empty step, a decode row and a prompt token cost: least squares over the latest steps, older ones
    counting less. Rows and tokens have separate costs: a row costs more than a token, and rows are in every step, so a
    fit of tokens alone would count rows as part of the empty step."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._sums = [0.0] * 8  # of d, p, s, dd, dp, pp, ds, ps: decode rows, prompt tokens, seconds
        self.empty_s: float | None = None  # None: unknown
        self.row_s = self.token_s = 0.0

    def observe(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """Add one step: its decode rows and prompt tokens."""
        d, p, s = num_rows, num_tokens, seconds
        self._weight = self._weight * _DECAY + 1.0
        latest = (d, p, s, d * d, d * p, p * p, d * s, p * s)
        self._sums = [old * _DECAY + new for old, new in zip(self._sums, latest, strict=True)]
        self._fit()

    def of(self, num_rows: float, num_tokens: float) -> float:
        """Seconds that these add to a step."""
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
            return  # keep the last fit
        self.row_s, self.token_s = max(0.0, self.row_s), max(0.0, self.token_s)
        self.empty_s = max(0.0, s - self.of(d, p))


class FloodControl:
    """One per scheduler. `begin_step` finds the noisy tenants of a step; the other methods use them."""

    def __init__(self, settings: SchedulerSettings, shares: FairShare, slots: RunningSlots) -> None:
        self._settings = settings
        self._shares = shares
        self._slots = slots
        self._cost = StepCost()
        self._now_s = 0.0
        self._begun_s = 0.0
        self.noisy: Set[str] = frozenset()
        self._share = 0.0  # of the noisy tenants, together
        self._credit_s = 0.0  # the part of their share of the latest steps that they did not get

    def begin_step(self, now_s: float) -> None:
        """A step is about to be scheduled."""
        self._now_s = self._begun_s = now_s
        noisy = [account for account in self._slots.holders() if self._wants_too_much(account)]
        self._share = sum(self._shares.share_of(account, now_s) for account in noisy)
        is_minority = 0.0 < self._share <= _MOST_SHARE
        self.noisy = {account.tenant for account in noisy} if is_minority else frozenset()

    def end_step(self, schedule: Schedule, now_s: float) -> None:
        """The step is over. If it was launched before the previous one was over, it began when that one ended."""
        num_decodes = schedule.num_decodes
        if not schedule.rows or not schedule.rows[-1].draft:  # drafts are neither decode rows nor prompts
            self._cost.observe(num_decodes, schedule.num_tokens - num_decodes, now_s - self._begun_s)
        self._begun_s = now_s
        if not self.noisy:
            self._credit_s = 0.0
        elif self._cost.empty_s is not None:
            noisy_s, others_s = self._split(schedule)
            most_s = _MOST_CREDIT * self._cost.empty_s
            owed_s = self._credit_s + self._share * (noisy_s + others_s) - noisy_s
            self._credit_s = max(-most_s, min(most_s, owed_s))

    def prompt_limit(self, schedule: Schedule, account: TenantAccount) -> int:
        """How many tokens the forward may hold if it contains a prompt of this tenant."""
        limit, cost = self._settings.tokens_per_step, self._cost
        if account.tenant not in self.noisy or cost.empty_s is None or not cost.token_s:
            return limit
        noisy_s, others_s = self._split(schedule)
        share_s = others_s * self._share / (1.0 - self._share) + self._credit_s
        room_s = max(_LONG * cost.empty_s - others_s, share_s) - noisy_s
        num_tokens = int(min(limit, max(0.0, room_s) / cost.token_s))
        return min(limit, schedule.num_tokens + max(0 if noisy_s else 1, num_tokens))

    def trim(self, schedule: Schedule) -> None:
        """Remove what noisy tenants have beyond their share, if another tenant computes a prompt in this forward."""
        if not self.noisy:
            return
        chunks = schedule.rows[schedule.num_decodes :]
        if all(self._is_noisy(row) for row in chunks) or self._is_short(schedule):
            return
        decodes = self._decodes_within_share(schedule.rows[: schedule.num_decodes])
        decoding = {row.request.tenant for row in decodes}  # a tenant without such a row would make no progress
        if self._credit_s <= 0.0:
            chunks = [row for row in chunks if not self._is_noisy(row) or row.request.tenant not in decoding]
        schedule.rows = decodes + chunks
        schedule.num_decodes = len(decodes)
        schedule.num_tokens = sum(row.num_tokens for row in schedule.rows)

    def _is_short(self, schedule: Schedule) -> bool:
        cost, num_decodes = self._cost, schedule.num_decodes
        if cost.empty_s is None:
            return True
        return cost.of(num_decodes, schedule.num_tokens - num_decodes) <= _SHORT * cost.empty_s

    def _decodes_within_share(self, decodes: list[ScheduledRow]) -> list[ScheduledRow]:
        """Of each noisy tenant the rows admitted first, as many as its share."""
        counts: Counter[str] = Counter()
        kept: list[ScheduledRow] = []
        for row in decodes:
            if self._is_noisy(row):
                tenant = row.request.tenant
                counts[tenant] += 1
                if counts[tenant] > max(1, int(self._share_of(self._shares.account(tenant)))):
                    continue
            kept.append(row)
        return kept

    def _split(self, schedule: Schedule) -> tuple[float, float]:
        """Seconds that noisy tenants add to this step, and that the others add."""
        num_decodes = schedule.num_decodes
        num_rows = sum(self._is_noisy(row) for row in schedule.rows[:num_decodes])
        num_tokens = sum(row.num_tokens for row in schedule.rows[num_decodes:] if self._is_noisy(row))
        noisy_s = self._cost.of(num_rows, num_tokens)
        return noisy_s, self._cost.of(num_decodes, schedule.num_tokens - num_decodes) - noisy_s

    def _is_noisy(self, row: ScheduledRow) -> bool:
        return row.request.tenant in self.noisy

    def _wants_too_much(self, account: TenantAccount) -> bool:
        count = account.num_running + account.num_waiting
        return count > _SLACK and count > _SLACK * self._share_of(account)

    def _share_of(self, account: TenantAccount) -> float:
        """Slots."""
        return self._slots.share_of(account, self._now_s)
