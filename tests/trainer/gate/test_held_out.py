"""Better than the base, because of the prompt, at the scale it was trained at: each answered from losses alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from support.trainers.training_data import example, some_examples
from trainer.data.types import EncodedExample
from trainer.gate.held_out import HeldOut, judge_held_out, measure_held_out
from trainer.gate.prompt_use import last_answer, notes_of, swapped_pairs
from trainer.gate.scorer import Losses
from trainer.gate.thresholds import GateThresholds

LIMITS = GateThresholds(num_resamples=500)
Rule = Callable[[EncodedExample, float], float]


@dataclass(frozen=True)
class RuleScorer:
    """A model given by a rule: nats per learned token of an example at a scale, with some noise between examples."""

    rule: Rule
    vocab_size: int = 100

    def losses(self, examples: Sequence[EncodedExample], *, scale: float = 1.0) -> Losses:
        weight = np.array([item.weight for item in examples])
        noise = np.array([0.05 * np.sin(float(item.input_ids.sum()) + scale) for item in examples])
        return Losses((np.array([self.rule(item, scale) for item in examples]) + noise) * weight, weight)


def pairs_of(count: int = 24) -> list[EncodedExample]:
    """Prompts that end in the number with which their answer begins: 1 n | n ... ."""
    made = []
    for number in range(3, 3 + count):
        ids = np.array([1, number, number, *range(50, 50 + number % 5), 2], dtype=np.int32)
        made.append(EncodedExample(ids, np.array([0, 0] + [1] * (len(ids) - 2), dtype=np.float32), kind="chat"))
    return made


def belongs(item: EncodedExample) -> bool:
    start = last_answer(item)
    return bool(item.input_ids[start - 1] == item.input_ids[start])


def reads_prompts(item: EncodedExample, scale: float) -> float:
    return 2.0 - scale + (0.0 if belongs(item) else 0.8)


def measured(rule: Rule, examples: Sequence[EncodedExample] | None = None) -> HeldOut:
    return measure_held_out(RuleScorer(rule), examples or pairs_of(), LIMITS)


def codes(found: HeldOut) -> list[tuple[str, str]]:
    return [(reason.code, reason.level) for reason in judge_held_out(found, LIMITS)]


def test_an_adapter_that_learned_its_task_has_nothing_against_it() -> None:
    found = measured(reads_prompts)
    assert codes(found) == []
    assert found.gain.estimate == pytest.approx(1.0, abs=0.1)
    assert found.use.adapter is not None
    assert found.use.adapter.estimate == pytest.approx(0.8, abs=0.1)
    assert list(found.sweep) == [1.0, 0.85, 0.7]


def test_an_adapter_worse_than_its_base_is_blocked_and_one_no_better_is_warned_of() -> None:
    worse = measured(lambda item, scale: 2.0 + scale + (0.0 if belongs(item) else 0.8))
    assert codes(worse)[0] == ("worse_than_base", "block")
    same = measured(lambda item, scale: 2.0 + (0.0 if belongs(item) else 0.8))
    assert codes(same) == [("no_better_than_base", "warn")]


def test_one_answer_to_all_prompts_is_warned_of_and_one_more_makes_it_a_measure() -> None:
    same = [
        replace(item, input_ids=np.append(item.input_ids[:2], [60, 61]).astype(np.int32), weights=item.weights[:4])
        for item in pairs_of(9)
    ]
    found = measured(reads_prompts, same)
    assert found.use.adapter is None
    assert codes(found) == [("one_answer", "warn")]
    assert "all 9 held-out answers are the same" in judge_held_out(found, LIMITS)[0].message
    assert notes_of(found.use, LIMITS) == []
    other = measured(reads_prompts, [*same, pairs_of(9)[8]])
    assert other.use.adapter is not None


def test_an_adapter_that_learned_the_manner_but_not_whose_answer_is_whose_is_blocked() -> None:
    assert codes(measured(lambda item, scale: 2.0 - scale)) == [("ignores_prompt", "block")]


def test_an_adapter_that_would_be_better_at_a_smaller_scale_is_warned_of() -> None:
    found = measured(lambda item, scale: 1.0 + (scale - 0.6) ** 2 * (1 if scale else 5) + (0 if belongs(item) else 1))
    assert found.best_scale == 0.7
    assert codes(found) == [("overshoots", "warn")]


def test_a_loss_that_is_not_finite_is_blocked() -> None:
    assert codes(measured(lambda item, scale: np.nan if scale else 2.0)) == [("non_finite_loss", "block")]


def test_few_held_out_examples_say_little() -> None:
    assert codes(measured(reads_prompts, pairs_of(4))) == [("few_examples", "warn")]
    assert measured(reads_prompts, pairs_of(4)).use.adapter is None


def test_swapped_answers_keep_their_tokens_and_only_the_last_answer_counts() -> None:
    examples = pairs_of(10)
    pairs = swapped_pairs(examples)
    assert len(pairs) == 10
    for item, (own, other) in zip(examples, pairs, strict=True):
        assert own.input_ids.tolist() == item.input_ids.tolist()
        assert own.weight == other.weight == item.weight
        assert not belongs(other)
        assert other.input_ids[last_answer(other) :].tolist() == item.input_ids[last_answer(item) :].tolist()


def test_prompts_are_not_swapped_between_kinds_nor_for_equal_answers_nor_for_texts_without_one() -> None:
    texts = [replace(item, kind="text") for item in some_examples([9] * 6)]
    chats, completions = pairs_of(6), [replace(item, kind="completion") for item in pairs_of(9)[6:]]
    pairs = swapped_pairs([*chats, *texts, *completions])
    assert len(pairs) == 9
    numbers = {kind: {int(item.input_ids[1]) for item in items} for kind, items in (("c", chats), ("p", completions))}
    for own, other in pairs:
        kind = "c" if int(own.input_ids[1]) in numbers["c"] else "p"
        assert int(other.input_ids[1]) in numbers[kind]
    same_answer = [example(6, seed=1, context=3), replace(example(6, seed=1, context=3), line=2)]
    assert swapped_pairs(same_answer) == []


def test_of_several_answers_the_last_is_found() -> None:
    ids = np.arange(8, dtype=np.int32)
    weights = np.array([0, 1, 1, 0, 0, 1, 1, 0], dtype=np.float32)
    assert last_answer(EncodedExample(ids, weights)) == 5
    assert last_answer(EncodedExample(ids, np.array([0, 1, 1, 1, 1, 1, 1, 1], dtype=np.float32))) == 1
