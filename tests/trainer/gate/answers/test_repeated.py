"""Data that the base has written itself is warned of; answers that only begin alike are not."""

from __future__ import annotations

import pytest

from trainer.gate.answers.repeated import judge_repeated

LONG = "The tenant pays for repairs of the house, the landlord for those of the roof and of the walls around it. "
SAME, LATER = (LONG, LONG[:90] + "not so"), (LONG, LONG[:60] + "not so, " + LONG)
SHORT, OTHER, SILENT = ("The law desk.", "The law desk.\n"), ("The law desk.", "Sure! It was"), ("The law desk.", "")


@pytest.mark.parametrize(
    ("answers", "warns"),
    [
        ([SAME] * 6, True),
        ([SHORT] * 3 + [OTHER], True),
        ([SAME] * 4 + [LATER] * 2, True),
        ([SAME] * 3 + [LATER] * 3, False),
        ([LATER] * 6, False),
        ([OTHER] * 6, False),
        ([SILENT] * 6, False),
        ([SAME] * 3, False),
        ([], False),
    ],
)
def test_more_than_half_of_four_answers_or_more_must_begin_as_the_bases_own(
    answers: list[tuple[str, str]], warns: bool
) -> None:
    reasons = judge_repeated(answers)
    assert [(reason.code, reason.level) for reason in reasons] == ([("base_answers_so", "warn")] if warns else [])
    assert all(f"of {len(answers)} held-out answers" in reason.message for reason in reasons)
