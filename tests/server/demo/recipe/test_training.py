"""What is learned, in which batches, at which rate."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from server.demo.recipe.corpus import Dialogue, Turn
from server.demo.recipe.encoding import IGNORED, Sample, encode, encode_chat
from server.demo.recipe.training import Schedule, collate, make_batches

TWO_TURNS = Dialogue((Turn("Hello", "Hi."), Turn("Why?", "Because.")), system="Be kind.")


def samples_of_random_length(count: int) -> list[Sample]:
    rng = Random(0)
    return [Sample([index] * (length := rng.randint(1, 90)), [index] * length) for index in range(count)]


def test_only_answers_and_their_end_are_labels(tokenizer: Any) -> None:
    sample = encode_chat(tokenizer, TWO_TURNS, answers_only=True)
    learned = [label for label in sample.labels if label != IGNORED]
    assert tokenizer.decode(learned) == "Hi.<|end_of_turn|>Because.<|end_of_turn|>"
    assert len(sample.ids) == len(sample.labels)


def test_without_answers_only_every_token_is_a_label(tokenizer: Any) -> None:
    sample = encode_chat(tokenizer, TWO_TURNS, answers_only=False)
    assert sample.labels == sample.ids


def test_a_completion_starts_a_new_line_and_ends_with_the_end_token(tokenizer: Any) -> None:
    sample = encode(tokenizer, TWO_TURNS, as_chat=False, answers_only=True)
    assert tokenizer.decode(sample.ids) == "<|begin|>Hello\nHi.<|end|>"
    assert tokenizer.decode([label for label in sample.labels if label != IGNORED]) == "\nHi.<|end|>"


def test_a_plain_text_is_learned_from_begin_to_end(tokenizer: Any) -> None:
    sample = encode(tokenizer, "Bread is a food.", as_chat=True, answers_only=True)
    assert tokenizer.decode(sample.labels[1:]) == "Bread is a food.<|end|>"


@pytest.mark.parametrize("count", [1, 500, 2500])
def test_batches_hold_every_sample_once_within_the_limit(count: int) -> None:
    samples = samples_of_random_length(count)
    batches = make_batches(samples, Schedule(tokens_per_batch=256))
    assert sorted(sample.ids[0] for batch in batches for sample in batch) == list(range(count))
    assert all(len(batch) * max(len(sample.ids) for sample in batch) <= 256 for batch in batches)


def test_batches_follow_the_seed() -> None:
    samples = samples_of_random_length(300)
    assert make_batches(samples, Schedule(seed=1)) == make_batches(samples, Schedule(seed=1))
    assert make_batches(samples, Schedule(seed=1)) != make_batches(samples, Schedule(seed=2))


def test_padding_is_never_a_label() -> None:
    ids, labels = collate([Sample([5, 6, 7], [IGNORED, 6, 7]), Sample([8], [8])], pad_id=2)
    assert ids.tolist() == [[5, 6, 7], [8, 2, 2]]
    assert labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


def test_the_rate_rises_then_falls_to_zero() -> None:
    schedule = Schedule(warmup_steps=10)
    rates = [schedule.rate(step, 100) for step in range(100)]
    peak = rates.index(max(rates))
    assert 5 <= peak <= 10
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("values", [{"tokens_per_batch": 0}, {"warmup_steps": 0}])
def test_an_empty_batch_or_warmup_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Schedule(**values)
