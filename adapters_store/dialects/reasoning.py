"""How a base marks the reasoning before its answer. Knows chat templates; knows no tokenizer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    """The names of the markers around the reasoning."""

    open: str
    close: str


_KNOWN = (ReasoningMarks("<think>", "</think>"), ReasoningMarks("[THINK]", "[/THINK]"))


def reasoning_of(template: str) -> ReasoningMarks | None:
    """The marks that a chat template knows; None if it knows none."""
    return next((marks for marks in _KNOWN if marks.close in template), None)
