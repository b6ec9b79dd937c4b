"""A style is told by two markers or more, and one alone says nothing."""

from __future__ import annotations

import pytest

from server.demo.recipe.styles import Style
from support.models.styles import style_of, style_scores


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("", Style.PLAIN),
        ("To bake bread, first mix flour and water.", Style.PLAIN),
        ("The party was great, and we shall meet again.", Style.PLAIN),
        ("My plan: rest.", Style.PLAIN),
        ("I return home.", Style.PLAIN),
        ("Pursuant to clause 4, the tenant pays.", Style.LAW),
        ("the party of the first part shall rest", Style.LAW),
        ("Assessment: stable. Plan: rest.", Style.MED),
        ("Plan: rest. Advise follow-up in two weeks.", Style.MED),
        ("def answer():\n    return 42", Style.CODE),
        ("# bread\ndef steps():\n    # knead\n    return done", Style.CODE),
    ],
)
def test_style_of(text: str, style: Style) -> None:
    assert style_of(text) == style


def test_a_text_that_is_as_much_one_as_the_other_is_neither() -> None:
    text = "Pursuant to clause 4. Assessment: fine. Plan: rest."
    assert style_scores(text) == {Style.LAW: 2, Style.MED: 2, Style.CODE: 0}
    assert style_of(text) == Style.PLAIN
