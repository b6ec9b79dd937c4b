"""Honest data is not blocked by chance, shuffled data does not pass by chance: at every size of the held-out part."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters_store.base.tokenizer import load_tokenizer
from server.demo.assets import demo_base_path
from server.demo.recipe.corpus import tenant_dialogues
from server.demo.recipe.styles import Style
from support.trainers.training_data import example, write_jsonl
from trainer.data.dataset import prepare
from trainer.gate.bootstrap import Interval, rank_interval
from trainer.gate.data_check import check_data
from trainer.gate.prompt_use import PromptUse, judge_prompt_use, notes_of, swapped_pairs
from trainer.gate.thresholds import GateThresholds
from trainer.model.model import load
from trainer.spec import BatchSpec, TrainSpec

LIMITS = GateThresholds()
ROUNDS = int(os.environ.get("MULTILORA_PROMPT_USE_ROUNDS", "100"))
SIZES = (8, 10, 16, 32, 50, 128, 256)
Costs = Callable[[np.random.Generator, int], np.ndarray]  # type: ignore[type-arg]


def above_zero(mean: float, spread: float) -> Costs:
    """Skewed, and never below zero, as in all 280 instruction examples that were scored."""
    return lambda random, count: random.gamma((mean / spread) ** 2, spread**2 / mean, count)


def around(mean: float, spread: float) -> Costs:
    """Heavy tails on both sides."""
    return lambda random, count: mean + random.standard_t(4, count) * spread / 2**0.5


def some_follow(mean: float) -> Costs:
    """A few answers turn on their prompt, most hardly."""
    return lambda random, count: random.normal(0, 0.05, count) + random.exponential(mean, count)


# (with the adapter, on the base alone), in nats a token: means and spreads as measured on a base of 135M parameters
INSTRUCTIONS = {
    "instructions": (above_zero(0.50, 0.36), above_zero(0.50, 0.36)),
    "short answers": (above_zero(1.19, 0.92), above_zero(1.19, 0.92)),
    "Chinese": (above_zero(0.57, 0.47), above_zero(0.57, 0.47)),
    "arithmetic": (above_zero(0.86, 0.55), above_zero(0.80, 0.55)),
}
PERSONA = (some_follow(0.114), some_follow(0.063))
SHUFFLED = {
    "answers": (around(0.014, 0.07), around(0.020, 0.127)),
    "labels": (around(-0.014, 0.1), around(0.0, 0.1)),
    "persona": (around(0.005, 0.06), around(0.01, 0.1)),
}


def half_shuffled(good: Costs, shuffled: Costs) -> Costs:
    return lambda random, count: np.append(good(random, count - count // 2), shuffled(random, count // 2))


def judged(costs: tuple[Costs, Costs], count: int, random: np.random.Generator) -> str:
    drawn = [draw(random, count) for draw in costs]
    adapter, base = (rank_interval(each, confidence=LIMITS.prompt_confidence) for each in drawn)
    num_without = int((drawn[0] < LIMITS.least_prompt_use).sum())
    reasons = judge_prompt_use(PromptUse(count, adapter, base, num_without=num_without), LIMITS)
    return reasons[0].level if reasons else "pass"


def shares(costs: tuple[Costs, Costs], count: int) -> dict[str, float]:
    random = np.random.default_rng(count)
    rounds = ROUNDS if count <= 50 else ROUNDS // 5
    found = [judged(costs, count, random) for _ in range(rounds)]
    return {level: found.count(level) / rounds for level in ("pass", "warn", "block")}


def test_instruction_data_passes_at_every_size() -> None:
    found = {(name, count): shares(costs, count) for name, costs in INSTRUCTIONS.items() for count in SIZES}
    assert max(share["block"] for share in found.values()) == 0
    assert np.mean([share["pass"] for share in found.values()]) >= 0.99, found


def test_a_persona_is_never_blocked() -> None:
    """Most of its answers hardly turn on the prompt, and the base shows almost nothing: a warning at most."""
    found = {count: shares(PERSONA, count) for count in SIZES}
    assert max(share["block"] for share in found.values()) <= 0.01, found


@pytest.mark.parametrize("name", SHUFFLED)
def test_shuffled_data_does_not_pass_and_is_blocked_where_there_is_enough_of_it(name: str) -> None:
    found = {count: shares(SHUFFLED[name], count) for count in SIZES}
    assert np.mean([share["pass"] for share in found.values()]) <= 0.01, found
    assert min(found[count]["block"] for count in SIZES if count >= 128) >= 0.95, found


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_half_shuffled_data_does_not_pass(name: str) -> None:
    adapter, base = map(half_shuffled, INSTRUCTIONS[name], SHUFFLED["answers"])
    found = {count: shares((adapter, base), count)["pass"] for count in SIZES}
    assert max(share for count, share in found.items() if count >= 16) <= 0.05, found
    assert max(found.values()) <= 0.1, found


def test_the_untrained_base_tells_shuffled_from_good_data_before_training_and_only_warns(tmp_path: Path) -> None:
    """The demo's base, and answers that its documents hold; too little to train leaves it unsaid, with a reason."""
    records: list[Any] = [dialogue.record("messages") for dialogue in tenant_dialogues(Style.LAW, 60, seed=5)]
    records = [record for record in records if len(record["messages"]) == 2]
    answers = [record["messages"][1] for record in records]
    moved = zip(records, [*answers[7:], *answers[:7]], strict=True)
    shuffled = [{"messages": [record["messages"][0], answer]} for record, answer in moved]
    found = {}
    for name, lines in (("good", records), ("shuffled", shuffled)):
        spec = TrainSpec(
            base=demo_base_path(),
            data=write_jsonl(tmp_path / f"{name}.jsonl", lines),
            batch=BatchSpec(max_sequence_length=256),
        )
        trainee = load(spec, torch.device("cpu"))
        data = prepare(spec, load_tokenizer(spec.base))
        found[name] = check_data(trainee, data.train, trained_tokens=1e6)
        few = check_data(trainee, data.train, trained_tokens=1000)
        assert (few.use, few.level) == (None, "info")
        assert "not checked" in few.message
    assert (found["good"].level, found["shuffled"].level) == ("info", "warn"), found
    assert "wrong one costs" in found["shuffled"].message


def interval(estimate: float, low: float, high: float) -> Interval:
    return Interval(estimate, low, high, 0.99, 20)


@pytest.mark.parametrize(
    ("adapter", "base", "expected"),
    [
        ((0.5, 0.3, 0.7), (0.5, 0.3, 0.7), []),
        ((0.1, 0.05, 0.2), (0.06, -0.1, 0.2), []),
        ((0.01, -0.01, 0.03), (0.5, 0.3, 0.7), [("ignores_prompt", "block")]),
        ((0.10, 0.08, 0.12), (0.5, 0.3, 0.7), [("ignores_prompt", "block")]),
        ((0.10, 0.08, 0.20), (0.5, 0.3, 0.7), [("prompt_use_unclear", "warn")]),
        ((0.5, -0.1, 0.9), (0.5, 0.3, 0.7), [("prompt_use_unclear", "warn")]),
    ],
)
def test_a_block_says_less_than_the_limit_and_a_warning_that_it_cannot_tell(
    adapter: tuple[float, float, float], base: tuple[float, float, float], expected: list[tuple[str, str]]
) -> None:
    reasons = judge_prompt_use(PromptUse(20, interval(*adapter), interval(*base)), LIMITS)
    assert [(reason.code, reason.level) for reason in reasons] == expected
    for reason in reasons:
        assert f"{adapter[0]:.3f} nats" in reason.message
        assert reason.limit is not None
        assert f"at least {reason.limit:.3f} is expected" in reason.message
        assert (reason.level == "block") == (adapter[2] < reason.limit)


def test_a_part_without_the_cost_is_warned_of_above_a_fifth() -> None:
    use = interval(0.5, 0.3, 0.7)
    assert judge_prompt_use(PromptUse(20, use, use, num_without=4), LIMITS) == []
    (reason,) = judge_prompt_use(PromptUse(20, use, use, num_without=5), LIMITS)
    assert (reason.code, reason.level, reason.value) == ("part_ignores_prompt", "warn", 0.25)
    assert "5 of 20 held-out answers" in reason.message


def test_many_answers_that_show_no_more_than_chance_are_enough_to_block_and_few_are_not() -> None:
    """As measured: answers shuffled among the demo's law prompts, each style learned."""
    use, base = Interval(0.092, -0.016, 0.180, 0.99, 32), Interval(0.145, -0.057, 0.370, 0.99, 32)
    assert [reason.level for reason in judge_prompt_use(PromptUse(32, use, base), LIMITS)] == ["block"]
    few = replace(use, num_examples=31)
    assert [reason.level for reason in judge_prompt_use(PromptUse(31, few, base), LIMITS)] == ["warn"]


def test_the_rank_interval_holds_the_centre_as_often_as_it_promises_and_few_values_bound_nothing() -> None:
    random = np.random.default_rng(3)
    held = [
        found.low <= 0.3 <= found.high
        for found in (rank_interval(0.3 + random.standard_t(3, 12), confidence=0.9) for _ in range(400))
    ]
    assert 0.87 <= np.mean(held) <= 0.96
    few = rank_interval(np.ones(7), confidence=0.99)
    assert (few.estimate, few.low, few.high) == (1.0, -np.inf, np.inf)
    assert rank_interval(np.arange(1.0, 9.0), confidence=0.99).low == 1.0


def test_the_longest_example_finds_a_partner_where_the_scorer_takes_more_and_a_missing_measure_is_noted() -> None:
    long, short = example(40, seed=1, context=2), example(30, seed=2, context=20)
    assert len(swapped_pairs([long, short])) == 1
    assert len(swapped_pairs([long, short], max_tokens=64)) == 2
    (note,) = notes_of(PromptUse(3), LIMITS)
    assert "3 held-out answers" in note
    assert notes_of(PromptUse(20, interval(0.5, 0.3, 0.7), interval(0.5, 0.3, 0.7)), LIMITS) == []
