"""Nothing that is judged was learned, whatever the file's order; the mix is the share that was asked for."""

from __future__ import annotations

import random

import pytest

from support.trainers.training_data import example, some_examples
from trainer.data.examples import Examples
from trainer.data.problems import DataRejected
from trainer.data.split import ENOUGH_VALIDATION, apart, mixed, split


def copies(count: int, distinct: int) -> Examples:
    return Examples.of(example(5, seed=index, digest=b"%016d" % (index % distinct)) for index in range(count))


@pytest.mark.parametrize(("distinct", "held_out"), [(8, 2), (32, 8), (100, 8), (160, 8), (161, 9), (2000, 100)])
def test_five_percent_is_held_out_but_not_too_few_nor_too_many(distinct: int, held_out: int) -> None:
    parts = split(copies(distinct, distinct))
    assert (len(parts.validation), len(parts.train)) == (held_out, distinct - held_out)


@pytest.mark.parametrize(
    ("distinct", "held_out"), [(8, 2), (32, 8), (50, 10), (91, 18), (160, 32), (640, 32), (641, 33), (2000, 100)]
)
def test_small_files_hold_out_enough_to_judge_by(distinct: int, held_out: int) -> None:
    assert len(split(copies(distinct, distinct), enough=ENOUGH_VALIDATION).validation) == held_out


def test_copies_never_straddle_the_border() -> None:
    parts = split(copies(900, 120))
    assert not {item.digest for item in parts.train} & {item.digest for item in parts.validation}
    assert len(parts.train) + len(parts.validation) == 900


def test_the_choice_depends_on_content_and_seed_not_on_order() -> None:
    examples = copies(300, 300)
    shuffled = Examples.of(random.Random(0).sample(list(examples), len(examples)))
    held_out = {item.digest for item in split(examples, seed=3).validation}
    assert {item.digest for item in split(shuffled, seed=3).validation} == held_out
    assert {item.digest for item in split(examples, seed=4).validation} != held_out


def test_too_few_distinct_examples_are_not_split() -> None:
    with pytest.raises(DataRejected, match="7 distinct examples, at least 8"):
        split(copies(70, 7))


def test_training_examples_that_the_validation_file_repeats_are_dropped() -> None:
    examples = copies(20, 20)
    parts = apart(examples, Examples.of(examples[5:8]))
    assert [item.digest for item in parts.train] == [item.digest for item in examples[:5] + examples[8:]]
    with pytest.raises(DataRejected) as refused:
        apart(examples, examples)
    assert refused.value.param == "validation"


def test_the_mix_makes_the_share_that_was_asked_for() -> None:
    of_general = b"g" * 16
    train = Examples.of(some_examples([5] * 190))
    general = Examples.of(example(6, seed=index, digest=of_general) for index in range(50))
    whole = mixed(train, general, fraction=0.05)
    assert len(whole) == 200
    assert sum(item.digest == of_general for item in whole) == 10
    assert len({item.line for item in whole if item.digest == of_general}) == 10
    assert len(mixed(train, general, fraction=0.5)) == 240
    assert len(mixed(train, general, fraction=0.0)) == 190
