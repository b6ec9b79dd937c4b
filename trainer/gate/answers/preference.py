"""Does the adapter prefer the chosen answers more than the base does? Knows losses of held-out pairs; knows no model.

A pair's margin is what DPO trains: log p(chosen) - log p(rejected) under the adapter, less the same under the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.types import EncodedExample
from trainer.gate.bootstrap import Interval, bound, rank_interval
from trainer.gate.held_out import gain_of
from trainer.gate.scorer import BASE_ALONE, Scorer
from trainer.gate.thresholds import GateThresholds
from trainer.gate.verdict import Reason


@dataclass(frozen=True)
class Preference:
    """margin: in nats a pair. accuracy: the share of pairs with a margin above 0. base_accuracy, adapter_accuracy: the
    share whose chosen answer is more likely than the rejected one. chosen_gain: base less adapter, in nats a token."""

    margin: Interval
    accuracy: float
    base_accuracy: float
    adapter_accuracy: float
    chosen_gain: Interval


def measure_preference(scorer: Scorer, pairs: Sequence[EncodedExample], limits: GateThresholds) -> Preference:
    """Score both texts of each pair, with the adapter and without."""
    chosen, rejected = ([pair.text(chosen=side) for pair in pairs] for side in (True, False))
    base, adapter = ([scorer.losses(texts, scale=scale) for texts in (chosen, rejected)] for scale in (BASE_ALONE, 1.0))
    prefers = [worse.nll - better.nll for better, worse in (base, adapter)]
    margins = prefers[1] - prefers[0]
    return Preference(
        margin=rank_interval(margins, confidence=limits.confidence),
        accuracy=float((margins > 0).mean()),
        base_accuracy=float((prefers[0] > 0).mean()),
        adapter_accuracy=float((prefers[1] > 0).mean()),
        chosen_gain=gain_of(base[0], adapter[0], limits),
    )


def judge_preference(found: Preference, limits: GateThresholds) -> list[Reason]:
    """The reasons against the adapter."""
    margin = found.margin
    if not np.isfinite(margin.estimate):
        return [Reason("non_finite_loss", "block", "the adapter's loss on held-out pairs is not a finite number")]
    measured = (
        f"margin from {bound(margin.low)} to {bound(margin.high)} nats, {found.accuracy:.0%} of "
        f"{margin.num_examples} held-out pairs above 0"
    )
    reasons = _judge_chosen(found, limits)
    if margin.is_below_zero:
        message = f"prefers the rejected answers more than the base does: {measured}"
        return [Reason("prefers_rejected", "block", message, margin.high, 0.0), *reasons]
    if margin.num_examples < limits.min_examples:
        message = (
            f"{margin.num_examples} held-out pairs are too few to judge, at least {limits.min_examples} are needed"
        )
        return [Reason("few_examples", "warn", message, margin.num_examples, limits.min_examples), *reasons]
    if not margin.is_above_zero:
        message = f"cannot tell whether the adapter prefers the chosen answers: {measured}"
        reasons.insert(0, Reason("preference_unclear", "warn", message, margin.low, 0.0))
    return reasons


def _judge_chosen(found: Preference, limits: GateThresholds) -> list[Reason]:
    """DPO may make both answers less likely; beyond a limit the adapter gives neither."""
    rise = -found.chosen_gain.estimate
    if rise <= limits.chosen_rise:
        return []
    message = (
        f"the chosen answers cost {rise:.2f} nats a token more than on the base: a larger dpo.beta keeps it nearer"
    )
    return [Reason("chosen_less_likely", "warn", message, rise, limits.chosen_rise)]
