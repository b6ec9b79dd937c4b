"""Does the adapter beat the base on held-out examples, and because of the prompt? Knows losses; knows no model.

Three questions. Is the held-out loss below the base's? Are the same answers harder behind a wrong prompt? (An adapter
trained on shuffled answers learns their style, beats the base, and fails here.) Is a smaller scale of the adapter
better?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.types import EncodedExample
from trainer.gate.bootstrap import Interval, paired_bootstrap
from trainer.gate.scorer import BASE_ALONE, Losses, Scorer
from trainer.gate.thresholds import GateThresholds
from trainer.gate.verdict import Reason


@dataclass(frozen=True)
class HeldOut:
    """Losses in nats per learned token. gain: base less adapter, so above zero is good.

    prompt_use: what a wrong prompt costs the adapter; None if there are too few prompts to swap.
    sweep: loss at each scale.
    """

    base_loss: float
    adapter_loss: float
    gain: Interval
    prompt_use: Interval | None
    sweep: dict[float, float]
    best_scale: float
    scale_gain: Interval | None

    def to_mapping(self) -> dict[str, object]:
        return {
            "base_loss": self.base_loss,
            "adapter_loss": self.adapter_loss,
            "gain": self.gain.to_mapping(),
            "prompt_use": self.prompt_use.to_mapping() if self.prompt_use else None,
            "sweep": {f"{scale:g}": loss for scale, loss in self.sweep.items()},
            "best_scale": self.best_scale,
            "scale_gain": self.scale_gain.to_mapping() if self.scale_gain else None,
        }


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
        prompt_use=_measure_prompt_use(scorer, examples, limits),
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


def _measure_prompt_use(scorer: Scorer, examples: Sequence[EncodedExample], limits: GateThresholds) -> Interval | None:
    pairs = swapped_pairs(examples)
    if len(pairs) < limits.min_examples:
        return None
    own = scorer.losses([pair[0] for pair in pairs])
    other = scorer.losses([pair[1] for pair in pairs])
    return gain_of(other, own, limits)


def swapped_pairs(examples: Sequence[EncodedExample]) -> list[tuple[EncodedExample, EncodedExample]]:
    """Each example's last answer behind its own prompt, and behind the prompt of the next one that answers otherwise.

    Only the last answer is scored in both, and prompts are swapped within a kind (chat, completion), whose forms
    differ. Examples without a prompt, and answers that all the others give too, are left out; no swapped pair is
    longer than the longest example.
    """
    longest = max(map(len, examples), default=0)
    starts = [last_answer(example) for example in examples]
    pairs = []
    for kind in sorted({example.kind for example in examples}):
        having = [n for n, example in enumerate(examples) if example.kind == kind and starts[n] > 1]
        for place, own in enumerate(having):
            answer = _answer(examples, starts, own)
            others = (n for n in (*having[place + 1 :], *having[:place]) if starts[n] + len(answer) <= longest)
            other = next((n for n in others if not np.array_equal(answer, _answer(examples, starts, n))), None)
            if other is not None:
                pairs.append((_joined(examples, starts, own, own), _joined(examples, starts, other, own)))
    return pairs


def _answer(examples: Sequence[EncodedExample], starts: Sequence[int], index: int) -> NDArray[np.int32]:
    return examples[index].input_ids[starts[index] :]


def last_answer(example: EncodedExample) -> int:
    """The position where the last run of learned tokens begins; what follows that run is not scored."""
    context = np.flatnonzero(~example.supervised[: int(np.flatnonzero(example.supervised)[-1])])
    return int(context[-1]) + 1


def _joined(examples: Sequence[EncodedExample], starts: Sequence[int], prompt: int, answer: int) -> EncodedExample:
    head, tail = examples[prompt].input_ids[: starts[prompt]], examples[answer].input_ids[starts[answer] :]
    weights = np.concatenate([np.zeros(len(head), dtype=np.float32), examples[answer].weights[starts[answer] :]])
    return EncodedExample(np.concatenate([head, tail]), weights)


def judge_held_out(found: HeldOut, limits: GateThresholds) -> list[Reason]:
    """The reasons against the adapter."""
    if not np.isfinite(found.adapter_loss):
        return [Reason("non_finite_loss", "block", "the adapter's held-out loss is not a finite number")]
    reasons = [*_judge_gain(found, limits), *_judge_prompt_use(found)]
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
        return [Reason("worse_than_base", "block", f"worse than the base: {losses}", gain.high, 0.0)]
    if gain.num_examples < limits.min_examples:
        count = gain.num_examples
        message = f"{count} held-out examples are too few to judge, at least {limits.min_examples} are needed: {losses}"
        return [Reason("few_examples", "warn", message, count, limits.min_examples)]
    if not gain.is_above_zero:
        return [
            Reason("no_better_than_base", "warn", f"not significantly better than the base: {losses}", gain.low, 0.0)
        ]
    return []


def _judge_prompt_use(found: HeldOut) -> list[Reason]:
    use = found.prompt_use
    if use is None or use.is_above_zero:
        return []
    message = (
        f"the adapter answers as well behind a wrong prompt (which costs only {use.estimate:.3f} nats): "
        "the answers in the data do not belong to their prompts, or nothing was learned from them"
    )
    return [Reason("ignores_prompt", "block", message, use.low, 0.0)]
