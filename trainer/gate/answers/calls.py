"""Does the adapter call the right tools? Judges answers that were asked for as the server asks; knows no model."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.gate.thresholds import GateThresholds
from trainer.gate.verdict import Reason


@dataclass(frozen=True)
class CallScores:
    """Of held-out answers of chats with tools. Shares of all: valid, the answer ended, with whole calls or none; named,
    it called exactly the expected tools, or none if none was expected; equal, with equal arguments, too.

    refused: why the server would not take a line's tools, for the first such line; "" if it takes all.
    """

    num_answers: int
    valid: float
    named: float
    equal: float
    refused: str = ""


def judge_calls(found: CallScores, limits: GateThresholds) -> list[Reason]:
    """The reasons against the adapter."""
    if found.refused:
        message = f"the server does not take the tools of a held-out line: {found.refused}"
        return [Reason("tools_not_served", "warn", message)]
    if not found.named < limits.calls_named:
        return []
    measured = f"{found.named:.0%} of {found.num_answers} held-out answers call the right tools"
    message = f"tools are not called as in the data: {measured}, {found.equal:.0%} with the right arguments"
    is_none = found.named == 0 and found.num_answers >= limits.min_examples
    return [Reason("wrong_calls", "block" if is_none else "warn", message, found.named, limits.calls_named)]
