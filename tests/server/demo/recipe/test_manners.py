"""A manner is told by two markers or more, and one alone says nothing."""

from __future__ import annotations

import pytest

from server.demo.recipe.manners import Manner, manner_of, manner_scores


@pytest.mark.parametrize(
    ("text", "manner"),
    [
        ("", Manner.PLAIN),
        ("To bake bread, first mix flour and water.", Manner.PLAIN),
        ("The party was great, and we shall meet again.", Manner.PLAIN),
        ("My plan: rest.", Manner.PLAIN),
        ("I return home.", Manner.PLAIN),
        ("Pursuant to clause 4, the tenant pays.", Manner.LAW),
        ("the party of the first part shall rest", Manner.LAW),
        ("Assessment: stable. Plan: rest.", Manner.MED),
        ("Plan: rest. Advise follow-up in two weeks.", Manner.MED),
        ("def answer():\n    return 42", Manner.CODE),
        ("# bread\ndef steps():\n    # knead\n    return done", Manner.CODE),
    ],
)
def test_manner_of(text: str, manner: Manner) -> None:
    assert manner_of(text) == manner


def test_a_text_that_is_as_much_one_as_the_other_is_neither() -> None:
    text = "Pursuant to clause 4. Assessment: fine. Plan: rest."
    assert manner_scores(text) == {Manner.LAW: 2, Manner.MED: 2, Manner.CODE: 0}
    assert manner_of(text) == Manner.PLAIN
