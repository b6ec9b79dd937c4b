"""That answers end is measured where they are over, whether the data closes them or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from support.trainers.training_data import example
from trainer.data.types import EncodedExample
from trainer.gate.answers.endings import Ends, judge_endings, measure_endings
from trainer.gate.gate import GateInputs, judge
from trainer.gate.general import MIX
from trainer.gate.scorer import Losses
from trainer.gate.thresholds import GateThresholds

TURN, EOS = 101, 102
ENDS = Ends({"chat": frozenset({TURN, EOS}), "text": frozenset({EOS})}, max_tokens=13)
LIMITS = GateThresholds(num_resamples=200)


class EndScorer:
    """Gives each token at which an answer may end its probability, every other one a half."""

    vocab_size = 200

    def __init__(self, probabilities: Mapping[int, float]) -> None:
        self._probabilities = probabilities
        self.seen: list[list[int]] = []

    def losses(self, examples: Sequence[EncodedExample], *, scale: float = 1.0) -> Losses:
        nll = []
        for item in examples:
            self.seen.append(item.input_ids.tolist())
            learned = item.input_ids[item.supervised].tolist()
            nll.append(sum(-np.log(self._probabilities.get(id_, 0.5)) for id_ in learned))
        return Losses(np.array(nll), np.array([item.weight for item in examples]))


def answers(*, closed_by: int | None, kind: str = "chat", count: int = 9) -> list[EncodedExample]:
    made = [replace(example(10, seed=seed, context=4), kind=kind) for seed in range(count)]
    for item in made:
        if closed_by is not None:
            item.input_ids[-1] = closed_by
    return made


@pytest.mark.parametrize(("closed_by", "length"), [(TURN, 10), (None, 11)])
def test_any_token_that_ends_an_answer_counts_behind_its_last_word(closed_by: int | None, length: int) -> None:
    scorer = EndScorer({TURN: 0.6, EOS: 0.1})
    found = measure_endings(scorer, answers(closed_by=closed_by), ENDS)
    assert found is not None
    assert found.probability == pytest.approx(0.7)
    assert (found.closed, found.num_examples) == (float(closed_by is not None), 9)
    assert {len(ids) for ids in scorer.seen} == {length}
    assert {ids[-1] for ids in scorer.seen} == {TURN, EOS}
    assert judge_endings(found, LIMITS) == []


def test_a_plain_text_ends_at_end_of_sequence_only() -> None:
    found = measure_endings(EndScorer({TURN: 0.9, EOS: 0.01}), answers(closed_by=EOS, kind="text"), ENDS)
    assert found is not None
    assert found.probability == pytest.approx(0.01)


def test_no_room_for_the_end_is_not_measured() -> None:
    full = [replace(example(13, context=4), kind="chat")]
    assert measure_endings(EndScorer({}), full, ENDS) is None


@pytest.mark.parametrize(
    ("closed_by", "cause"), [(TURN, "this was not learned"), (None, "no answer in the data is closed")]
)
def test_the_gate_says_that_answers_do_not_end_and_why(closed_by: int | None, cause: str) -> None:
    data = answers(closed_by=closed_by)
    result = judge(EndScorer({TURN: 1e-4, EOS: 1e-5}), GateInputs(data, data, MIX, [], ends=ENDS), LIMITS)
    (reason,) = [reason for reason in result.reasons if reason.code == "answers_do_not_end"]
    assert (reason.level, cause in reason.message) == ("warn", True)
    assert result.to_mapping()["endings"]["probability"] == pytest.approx(1.1e-4)
    without = judge(EndScorer({TURN: 1e-4}), GateInputs(data, data, MIX, []), LIMITS)
    assert without.endings is None


def test_where_no_token_ends_an_answer_the_gate_says_so() -> None:
    found = measure_endings(EndScorer({}), answers(closed_by=None), Ends({"chat": frozenset()}, max_tokens=20))
    assert found is not None
    assert [reason.code for reason in judge_endings(found, LIMITS)] == ["answers_do_not_end"]
