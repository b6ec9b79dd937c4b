"""Does the adapter beat the base on held-out examples, and because of the prompt? Knows losses; knows no model.

Three questions. Is the held-out loss below the base's? Are the same answers harder behind a wrong prompt (see
prompt_use)? Is a smaller scale of the adapter better?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from trainer.data.types import EncodedExample
from trainer.gate.bootstrap import Interval, bound, paired_bootstrap
from trainer.gate.prompt_use import PromptUse, judge_prompt_use, measure_prompt_use
from trainer.gate.scorer import BASE_ALONE, Losses, Scorer
from trainer.gate.thresholds import GateThresholds
from trainer.gate.verdict import Reason


@dataclass(frozen=True)
class HeldOut:
    """Losses in nats per learned token. gain: base less adapter, so above zero is good.

    use: what a wrong prompt costs. sweep: loss at each scale.
    """

    base_loss: float
    adapter_loss: float
    gain: Interval
    use: PromptUse
    sweep: dict[float, float]
    best_scale: float
    scale_gain: Interval | None

    def to_mapping(self) -> dict[str, object]:
        body = {**asdict(self), "sweep": {f"{scale:g}": loss for scale, loss in self.sweep.items()}}
        del body["use"]
        return {**body, **self.use.to_mapping()}


def measure_held_out(scorer: Scorer, examples: Sequence[EncodedExample], limits: GateThresholds) -> HeldOut:
    """Score the examples on the base, at every scale, and behind swapped prompts."""
    base = scorer.losses(examples, scale=BASE_ALONE)
    at_scale = {scale: scorer.losses(examples, scale=scale) for scale in {1.0, *limits.scales}}
    adapter = at_scale[1.0]
    sweep = {scale: at_scale[scale].mean for scale in sorted(at_scale, reverse=True)}
    best_scale = min(sweep, key=lambda scale: sweep[scale] if np.isfinite(sweep[scale]) else np.inf)
    return HeldOut(
        base_loss=base.mean,
        adapter_loss=adapter.mean,
        gain=gain_of(base, adapter, limits),
        use=measure_prompt_use(scorer, examples, limits),
        sweep=sweep,
        best_scale=best_scale,
        scale_gain=gain_of(adapter, at_scale[best_scale], limits) if best_scale != 1.0 else None,
    )


def gain_of(before: Losses, after: Losses, limits: GateThresholds) -> Interval:
    """The second loss below the first."""
    return paired_bootstrap(
        before.nll - after.nll,
        before.weight,
        confidence=limits.confidence,
        num_resamples=limits.num_resamples,
        seed=limits.seed,
    )


@dataclass(frozen=True)
class Int8Loss:
    """The held-out loss in nats per learned token: as trained, and as it is served in int8."""

    loss: float
    int8_loss: float

    @property
    def change(self) -> float:
        return self.int8_loss - self.loss

    def to_mapping(self) -> dict[str, object]:
        return {**asdict(self), "change": self.change}


def judge_int8(found: Int8Loss, limits: GateThresholds) -> list[Reason]:
    """The reasons against serving the adapter in int8."""
    if abs(found.change) <= limits.int8_change:
        return []
    message = f"int8 changes the held-out loss by {found.change:+.3g} nats, the limit is {limits.int8_change:g}"
    advice = "train it without adapter_dtype"
    return [Reason("int8_changes_too_much", "block", f"{message}; {advice}", found.change, limits.int8_change)]


def judge_held_out(found: HeldOut, limits: GateThresholds) -> list[Reason]:
    """The reasons against the adapter."""
    if not np.isfinite(found.adapter_loss):
        return [Reason("non_finite_loss", "block", "the adapter's held-out loss is not a finite number")]
    reasons = [*_judge_gain(found, limits), *judge_prompt_use(found.use, limits)]
    better = found.scale_gain
    if better is not None and better.is_above_zero and better.estimate > limits.sweep_gain:
        message = (
            f"at scale {found.best_scale:g} the same adapter is better by {better.estimate:.3f} nats: it overshoots"
        )
        reasons.append(Reason("overshoots", "warn", message, better.estimate, limits.sweep_gain))
    return reasons


def _judge_gain(found: HeldOut, limits: GateThresholds) -> list[Reason]:
    gain = found.gain
    losses = f"held-out loss {found.adapter_loss:.3f}, base {found.base_loss:.3f}"
    if gain.is_below_zero:
        message = f"worse than the base by at least {-gain.high:.3f} nats: {losses}"
        return [Reason("worse_than_base", "block", message, gain.high, 0.0)]
    if gain.num_examples < limits.min_examples:
        count = gain.num_examples
        message = f"{count} held-out examples are too few to judge, at least {limits.min_examples} are needed: {losses}"
        return [Reason("few_examples", "warn", message, count, limits.min_examples)]
    if gain.is_above_zero:
        return []
    if gain.high <= limits.small_gain:
        message = f"better than the base by at most {gain.high:.3f} nats: {losses}"
        return [Reason("no_better_than_base", "warn", message, gain.high, limits.small_gain)]
    message = (
        f"{gain.num_examples} held-out examples cannot tell whether the adapter is better than the base: {losses}, "
        f"gain from {bound(gain.low)} to {bound(gain.high)} nats"
    )
    return [Reason("gain_unclear", "warn", message, gain.low, 0.0)]
