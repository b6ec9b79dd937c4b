"""The verdict is the worst reason; every part's finding arrives in it, and its JSON has no number that JSON lacks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from support.trainers.training_data import demo_tokenizer, some_examples
from trainer.data.problems import DataRejected
from trainer.data.types import EncodedExample
from trainer.gate.gate import GateInputs, finite_or_none, judge, refused
from trainer.gate.general import MIX, judge_general, measure_general, own_examples
from trainer.gate.general_text import PASSAGES
from trainer.gate.round_trip import RoundTrip, compare, judge_round_trip
from trainer.gate.scorer import Losses
from trainer.gate.spectrum import ModuleWeights
from trainer.gate.thresholds import GateThresholds
from trainer.gate.verdict import Reason, verdict_of

LIMITS = GateThresholds(num_resamples=200)
EXACT = RoundTrip("float32", 1e-6, 1e-4, "largest logit difference", 1)


class FlatScorer:
    """Every token costs `base` nats on the base, `adapter` with it; with a vocabulary of 100 a guess costs 4.6."""

    vocab_size = 100

    def __init__(self, base: float, adapter: float) -> None:
        self._nats = {False: base, True: adapter}

    def losses(self, examples: Sequence[EncodedExample], *, scale: float = 1.0) -> Losses:
        weight = np.array([item.weight for item in examples])
        return Losses(weight * self._nats[scale > 0], weight)


def inputs(*, size: float = 0.01, round_trip: RoundTrip | None = EXACT) -> GateInputs:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 20, generator=generator), torch.randn(20, 8, generator=generator) * size
    texts = some_examples([12] * 20)
    return GateInputs(texts, texts, MIX, [ModuleWeights("m.q_proj", a, b, 2.0, 10.0)], round_trip)


def general_codes(base: float, adapter: float) -> list[tuple[str, str]]:
    found = measure_general(FlatScorer(base, adapter), some_examples([9] * 20), MIX, LIMITS)
    return [(reason.code, reason.level) for reason in judge_general(found, LIMITS)]


@pytest.mark.parametrize(
    ("rise", "expected"),
    [
        (-0.5, []),
        (0.09, []),
        (0.11, [("forgets", "warn")]),
        (0.29, [("forgets", "warn")]),
        (0.31, [("forgets", "block")]),
    ],
)
def test_general_text_warns_above_a_tenth_and_blocks_above_three(rise: float, expected: list[tuple[str, str]]) -> None:
    assert general_codes(2.0, 2.0 + rise) == expected


@pytest.mark.parametrize(
    ("gain", "level"), [(math.nan, "block"), (-6.0, "block"), (2.6, "block"), (3.3, "warn"), (6.1, "warn")]
)
def test_a_narrow_task_may_forget_a_tenth_of_what_it_gains(gain: float, level: str) -> None:
    """Labels learned with a gain of 6.1 nats and a rise of 0.32 are a good adapter."""
    scorer = FlatScorer(2.0, 2.32)
    found = measure_general(scorer, own_examples(demo_tokenizer(), max_tokens=8), MIX, LIMITS)
    assert [reason.level for reason in judge_general(found, LIMITS, gain=gain)] == [level]


def test_a_base_that_only_guesses_at_the_text_is_not_judged_by_it() -> None:
    assert general_codes(4.7, 9.0) == []
    assert general_codes(4.5, 9.0) == [("forgets", "block")]
    assert general_codes(4.7, math.nan) == [("general_not_finite", "block")]


def test_the_projects_own_text_is_learned_whole() -> None:
    examples = own_examples(demo_tokenizer(), max_tokens=512)
    assert len(examples) == len(PASSAGES) == len(set(PASSAGES))
    assert len(PASSAGES) >= 30
    assert all(item.supervised.sum() == len(item) - 1 for item in examples)
    assert max(map(len, own_examples(demo_tokenizer(), max_tokens=9))) == 9


def test_a_base_without_a_row_for_a_token_of_that_text_is_refused_by_name() -> None:
    with pytest.raises(DataRejected) as refusal:
        own_examples(demo_tokenizer(), max_tokens=512, num_embeddings=100)
    assert (refusal.value.param, refusal.value.code) == ("general text", "token_without_embedding")


def test_served_logits_are_held_against_pefts() -> None:
    exact = [torch.randn(5, 30, generator=torch.Generator().manual_seed(seed)) * 3 for seed in range(3)]
    near = [logits + 1e-5 for logits in exact]
    far = [exact[0], exact[1] + 0.01, exact[2]]
    assert judge_round_trip(compare(near, exact, None, LIMITS, precision="float32")) == []
    (reason,) = judge_round_trip(compare(far, exact, None, LIMITS, precision="float32"))
    assert (reason.code, reason.level, reason.limit) == ("round_trip", "block", 1e-4)
    broken = [torch.full_like(logits, torch.nan) for logits in exact]
    assert judge_round_trip(compare(broken, exact, None, LIMITS, precision="nf4"))[0].level == "block"


def test_in_bfloat16_the_server_may_be_as_far_off_as_peft_is_but_not_much_more() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(8, 30, generator=generator)]
    noise = [torch.randn(8, 30, generator=generator) * 0.01]
    peft = [exact[0] + noise[0]]
    for factor, expected in ((1.2, 0), (1.8, 1)):
        ours = [exact[0] - noise[0] * factor]
        found = compare(ours, exact, peft, LIMITS, precision="bfloat16")
        assert found.difference == pytest.approx(factor, rel=1e-3)
        assert len(judge_round_trip(found)) == expected


def test_a_good_adapter_passes_and_its_json_says_all() -> None:
    result = judge(FlatScorer(2.0, 1.0), inputs(), LIMITS)
    body = json.loads(json.dumps(result.to_mapping(), allow_nan=False))
    assert (body["verdict"], body["reasons"]) == ("pass", [])
    assert body["held_out"]["gain"]["estimate"] == pytest.approx(1.0)
    assert body["general"]["rise"]["estimate"] == pytest.approx(-1.0)
    assert len(body["spectrum"][0]["singular_values"]) == 8
    assert body["thresholds"]["general_block"] == 0.30


def test_every_part_can_block() -> None:
    wrong = RoundTrip("float32", 0.5, 1e-4, "largest logit difference", 1)
    assert judge(FlatScorer(1.0, 2.0), inputs(), LIMITS).verdict == "block"
    assert judge(FlatScorer(2.0, 1.0), inputs(size=50.0), LIMITS).verdict == "block"
    found = judge(FlatScorer(2.0, 1.0), inputs(round_trip=wrong), LIMITS)
    assert [reason.code for reason in found.reasons] == ["round_trip"]
    assert "0.5" in found.to_mapping()["reasons"][0]


def test_weights_that_are_not_finite_end_the_gate_before_anything_is_scored() -> None:
    broken = inputs()
    broken.weights[0].b[0, 0] = torch.nan
    result = judge(FlatScorer(2.0, 1.0), broken, LIMITS)
    assert (result.verdict, result.held_out) == ("block", None)
    json.dumps(result.to_mapping(), allow_nan=False)


def test_losses_that_are_not_finite_are_null_in_json_and_block() -> None:
    result = judge(FlatScorer(2.0, math.inf), inputs(), LIMITS)
    body = json.loads(json.dumps(result.to_mapping(), allow_nan=False))
    assert body["verdict"] == "block"
    assert body["held_out"]["adapter_loss"] is None
    assert finite_or_none({"a": [math.nan, (1.0, -math.inf)]}) == {"a": [None, [1.0, None]]}


def test_an_adapter_the_server_refuses_is_blocked_with_the_servers_code() -> None:
    result = refused("unsupported_dora", "DoRA is not served")
    assert result.verdict == "block"
    assert result.to_mapping()["findings"][0]["code"] == "unsupported_dora"
    assert result.to_mapping()["held_out"] is None


def test_a_verdict_is_its_worst_reason() -> None:
    warn, block = Reason("a", "warn", "a"), Reason("b", "block", "b")
    assert [verdict_of(reasons) for reasons in ([], [warn], [warn, block], [block])] == [
        "pass",
        "warn",
        "block",
        "block",
    ]
