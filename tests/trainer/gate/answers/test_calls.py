"""What held-out calls say against an adapter."""

from __future__ import annotations

from trainer.gate.answers.calls import CallScores, judge_calls
from trainer.gate.thresholds import GateThresholds

LIMITS = GateThresholds()


def levels(scores: CallScores) -> list[tuple[str, str]]:
    return [(reason.code, reason.level) for reason in judge_calls(scores, LIMITS)]


def test_an_adapter_that_calls_the_right_tools_passes_whatever_its_arguments() -> None:
    assert levels(CallScores(10, valid=1.0, named=0.9, equal=0.0)) == []


def test_wrong_tools_warn_and_no_right_one_in_eight_blocks() -> None:
    assert levels(CallScores(10, valid=1.0, named=0.5, equal=0.5)) == [("wrong_calls", "warn")]
    assert levels(CallScores(8, valid=1.0, named=0.0, equal=0.0)) == [("wrong_calls", "block")]
    assert levels(CallScores(7, valid=1.0, named=0.0, equal=0.0)) == [("wrong_calls", "warn")]


def test_tools_that_the_server_refuses_are_said() -> None:
    [reason] = judge_calls(CallScores(0, 0.0, 0.0, 0.0, refused="tools has the keyword not"), LIMITS)
    assert (reason.code, reason.level) == ("tools_not_served", "warn")
    assert "keyword not" in reason.message
