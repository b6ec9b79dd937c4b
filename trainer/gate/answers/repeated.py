"""Does the base alone already answer as the data does? Knows texts of answers; knows no model.

Data that the base has written teaches nothing: the loss falls all the same, because the adapter grows surer of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.gate.verdict import Reason

_FEWEST = 4  # answers
_SHARE = 0.5
_CHARACTERS = 80  # or the whole of a shorter answer


def judge_repeated(answers: Sequence[tuple[str, str]]) -> list[Reason]:
    """answers: the data's, and the base's own to the same prompt."""
    count = sum(_begin_alike(expected.strip(), own.strip()) for expected, own in answers)
    share = count / max(1, len(answers))
    if len(answers) < _FEWEST or share <= _SHARE:
        return []
    message = f"the base alone already gives {count} of {len(answers)} held-out answers: the data teaches little"
    return [Reason("base_answers_so", "warn", message, share, _SHARE)]


def _begin_alike(one: str, other: str) -> bool:
    return one[:_CHARACTERS] == other[:_CHARACTERS] != ""
