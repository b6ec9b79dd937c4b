"""Are the same answers harder behind a wrong prompt? Knows losses; knows no model.

An adapter trained on shuffled answers learns their style and beats the base; behind a wrong prompt its answers are no
harder. An answer's cost is what the wrong prompt adds, in nats per learned token; every answer counts alike, so a short
one with a huge cost rules nothing. Three outcomes: the cost is there; it is surely less than matters, or no more than
chance over many answers, which blocks; or the held-out examples cannot tell, which warns. What matters is a quarter of
what the base alone shows on the same pairs, and at least `least_prompt_use`. Where the cost is there, but many answers
do not have it, a part of the data may be shuffled: this warns, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.types import EncodedExample
from trainer.gate.bootstrap import Interval, bound, rank_interval
from trainer.gate.scorer import BASE_ALONE, Losses, Scorer
from trainer.gate.thresholds import GateThresholds
from trainer.gate.verdict import Reason

Pair = tuple[EncodedExample, EncodedExample]


@dataclass(frozen=True)
class PromptUse:
    """What a wrong prompt costs, with the adapter and on the base alone; None if num_pairs are too few to measure.
    num_alike: the answers, if all are the same; else 0. num_without: answers that a wrong prompt makes harder by less
    than matters, with the adapter."""

    num_pairs: int
    adapter: Interval | None = None
    base: Interval | None = None
    num_alike: int = 0
    num_without: int = 0

    def to_mapping(self) -> dict[str, object]:
        return {
            "prompt_use": self.adapter and asdict(self.adapter),
            "base_prompt_use": self.base and asdict(self.base),
            "num_prompt_pairs": self.num_pairs,
            "num_without_prompt_use": self.num_without,
            "num_alike_answers": self.num_alike,
        }


def measure_prompt_use(scorer: Scorer, examples: Sequence[EncodedExample], limits: GateThresholds) -> PromptUse:
    """Score each answer behind its own and a wrong prompt, with the adapter and on the base alone."""
    pairs = swapped_pairs(examples, max_tokens=limits.max_pair_tokens)
    if len(pairs) < limits.min_examples:
        return PromptUse(len(pairs), num_alike=_num_alike(examples))
    own, other = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    adapter, base = (
        costs_of(scorer.losses(own, scale=scale), scorer.losses(other, scale=scale)) for scale in (1.0, BASE_ALONE)
    )
    use, base_use = (rank_interval(costs, confidence=limits.prompt_confidence) for costs in (adapter, base))
    return PromptUse(len(pairs), use, base_use, num_without=int((adapter < limits.least_prompt_use).sum()))


def costs_of(own: Losses, other: Losses) -> NDArray[np.float64]:
    """[n]: nats per learned token that the wrong prompt costs each answer."""
    return (other.nll - own.nll) / own.weight


def judge_prompt_use(found: PromptUse, limits: GateThresholds) -> list[Reason]:
    """The reasons against the adapter; none if too few prompts could be swapped, which the report says."""
    if found.num_alike:
        message = (
            f"all {found.num_alike} held-out answers are the same: nothing shows that an answer follows from a prompt"
        )
        return [Reason("one_answer", "warn", message, found.num_alike)]
    use = found.adapter
    if use is None or not np.isfinite(use.estimate):
        return []
    least = limits.least_prompt_use
    if found.base is not None and np.isfinite(found.base.estimate):
        least = max(least, limits.prompt_use_share * found.base.estimate)
    if use.is_above_zero and use.estimate >= least:
        return _judge_share(found, limits)
    measured = f"{use.estimate:.3f} nats, from {bound(use.low)} to {bound(use.high)}, {use.num_examples} answers"
    if use.high < least:
        message = (
            f"the adapter answers as well behind a wrong prompt: it costs {measured}; at least {least:.3f} is "
            "expected. The answers in the data do not belong to their prompts, or nothing was learned from them"
        )
        return [Reason("ignores_prompt", "block", message, use.high, least)]
    if use.num_examples >= limits.enough_pairs and not use.is_above_zero:
        message = (
            f"the adapter answers as well behind a wrong prompt, as far as many answers show: it costs {measured}, "
            "which may be chance. The answers in the data do not belong to their prompts"
        )
        return [Reason("ignores_prompt", "block", message, use.low, 0.0)]
    message = (
        "the held-out examples cannot tell whether answers follow from their prompts: a wrong prompt costs "
        f"{measured}; at least {least:.3f} is expected. "
        "A persona or a fixed style may look so; so does data with wrong answers"
    )
    return [Reason("prompt_use_unclear", "warn", message, use.estimate, least)]


def _judge_share(found: PromptUse, limits: GateThresholds) -> list[Reason]:
    """Answers that hardly turn on their prompts among those that do."""
    share = found.num_without / found.num_pairs
    if share <= limits.without_prompt_use:
        return []
    message = (
        f"a wrong prompt costs {found.num_without} of {found.num_pairs} held-out answers less than "
        f"{limits.least_prompt_use:g} nats: they may not belong to their prompts"
    )
    return [Reason("part_ignores_prompt", "warn", message, share, limits.without_prompt_use)]


def notes_of(found: PromptUse, limits: GateThresholds) -> list[str]:
    """What was not measured, and why."""
    if found.adapter is not None or found.num_alike:
        return []
    return [
        f"whether answers follow from their prompts was not measured: {found.num_pairs} held-out answers have another "
        f"prompt to stand behind, at least {limits.min_examples} are needed"
    ]


def swapped_pairs(examples: Sequence[EncodedExample], *, max_tokens: int = 0) -> list[Pair]:
    """Each example's last answer behind its own prompt, and behind the prompt of the next one that answers otherwise.

    Only the last answer is scored in both, and prompts are swapped within a kind (chat, completion), whose forms
    differ. Examples without a prompt, and answers that all the others give too, are left out; no swapped pair is
    longer than the longest example, or than max_tokens if that is more.
    """
    longest = max(*map(len, examples), max_tokens, 0)
    pairs = []
    for kind in sorted({example.kind for example in examples}):
        cut = [_cut(example) for example in examples if example.kind == kind]
        cut = [each for each in cut if len(each[0]) > 1]
        for place, (own, answer, weights) in enumerate(cut):
            for other, wrong, _ in (*cut[place + 1 :], *cut[:place]):
                if len(other) + len(answer) <= longest and not np.array_equal(answer, wrong):
                    pairs.append((_joined(own, answer, weights), _joined(other, answer, weights)))
                    break
    return pairs


def _num_alike(examples: Sequence[EncodedExample]) -> int:
    """The answers behind a prompt, if they are two or more and all the same; else 0."""
    found = [answer.tobytes() for prompt, answer, _ in map(_cut, examples) if len(prompt) > 1]
    return len(found) if len(found) > 1 and len({*found}) == 1 else 0


def _cut(example: EncodedExample) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """The prompt of the last answer, the answer, and the answer's weights."""
    start = last_answer(example)
    return example.input_ids[:start], example.input_ids[start:], example.weights[start:]


def last_answer(example: EncodedExample) -> int:
    """The position where the last run of learned tokens begins; what follows that run is not scored."""
    return int(np.flatnonzero(~example.supervised[: example.end])[-1]) + 1


def _joined(prompt: NDArray[np.int32], answer: NDArray[np.int32], weights: NDArray[np.float32]) -> EncodedExample:
    context = np.zeros(len(prompt), dtype=np.float32)
    return EncodedExample(np.concatenate([prompt, answer]), np.concatenate([context, weights]))
