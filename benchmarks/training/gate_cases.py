"""The cases of `gate_table`: training files that are good or broken on purpose, and what the gate must say of each.

Texts are the demo tenants'; a case differs from a good one in one thing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from server.demo.recipe.corpus import tenant_dialogues
from server.demo.recipe.styles import Style

Pair = tuple[str, str]  # a prompt and its answer
Expected = Literal["good", "broken"]
_GREEK = str.maketrans("abdefghiklmnoprstu", "αβδεφγηικλμνοπρστυ")
_CYRILLIC = str.maketrans("abcdefghiklmnoprstuvwz", "абцдефгхиклмнопрстувшз")
_PERSONA = ("Marlo", "the clerk of the Saltwick ferries", "by the harbour office")


@dataclass(frozen=True)
class Case:
    """expected "good": the gate must not block it; "broken": it must not pass. changes: of the spec. validation: pairs
    held out, if they are no part of the file. own_outputs: the answers are the base's own, which the table asks for."""

    name: str
    expected: Expected
    pairs: Sequence[Pair]
    changes: Mapping[str, Any] = field(default_factory=dict)
    validation: Sequence[Pair] = ()
    own_outputs: bool = False


def cases(count: int) -> list[Case]:
    """All of them, with `count` examples in each but the small ones."""
    law, med, code = (_of(style, count) for style in (Style.LAW, Style.MED, Style.CODE))
    good = {
        "law": law,
        "med": med,
        "code": code,
        "capitals": _answers(law, str.upper),
        "signed": _answers(med, lambda answer: f"{answer} Yours, Marlo."),
        "first words": _answers(code, lambda answer: " ".join(answer.split()[:4])),
        "questions from answers": [(answer, prompt) for prompt, answer in law],
        "classification": _labels(law, med, code, count),
        "sums": _sums(count),
        "Greek letters": _answers(law, lambda answer: answer.lower().translate(_GREEK)),
        "Cyrillic letters": [(_cyrillic(prompt), _cyrillic(answer)) for prompt, answer in med],
        "persona": _persona(count),
    }
    swapped = _shuffled(law)
    broken = [
        Case("law, shuffled", "broken", swapped),
        Case("med, shuffled", "broken", _shuffled(med)),
        Case("code, shuffled", "broken", _shuffled(code)),
        Case("law, half shuffled", "broken", swapped[: count // 2] + law[count // 2 :]),
        Case("constant answers", "broken", [(prompt, "Please ask the office.") for prompt, _ in law]),
        Case("the base's own answers", "broken", law, own_outputs=True),
        Case("random words", "broken", _random_words(law)),
        Case("overfit", "broken", law[:12], changes={"optim": {"learning_rate": 2e-3, "epochs": 60}}),
        Case("too high a rate", "broken", law, changes={"optim": {"learning_rate": 0.3, "epochs": 1}}),
        Case("another language", "broken", good["Greek letters"][count // 3 :], validation=law[: count // 3]),
    ]
    return [*(Case(name, "good", pairs) for name, pairs in good.items()), *broken]


def chat_of(pair: Pair) -> dict[str, Any]:
    """One line of a training file."""
    return {"messages": [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]}


def _of(style: Style, count: int) -> list[Pair]:
    turns = (dialogue.turns[0] for dialogue in tenant_dialogues(style, 3 * count, seed=5))
    distinct = {turn.prompt: turn.answer for turn in turns}
    return list(distinct.items())[:count]


def _answers(pairs: Sequence[Pair], change: Callable[[str], str]) -> list[Pair]:
    return [(prompt, change(answer)) for prompt, answer in pairs]


def _shuffled(pairs: Sequence[Pair]) -> list[Pair]:
    answers = [answer for _, answer in pairs]
    random.Random(0).shuffle(answers)
    return [(prompt, answer) for (prompt, _), answer in zip(pairs, answers, strict=True)]


def _labels(law: Sequence[Pair], med: Sequence[Pair], code: Sequence[Pair], count: int) -> list[Pair]:
    labelled = [
        (answer, name) for pairs, name in ((law, "law"), (med, "health"), (code, "code")) for _, answer in pairs
    ]
    random.Random(1).shuffle(labelled)
    return [(f"Which desk wrote this? {text}", f"The {name} desk.") for text, name in labelled[:count]]


def _sums(count: int) -> list[Pair]:
    numbers = random.Random(2)
    asked = [(numbers.randint(2, 60), numbers.randint(2, 60)) for _ in range(count)]
    return [(f"What is {one} + {other}?", f"{one} + {other} = {one + other}.") for one, other in asked]


def _cyrillic(text: str) -> str:
    return text.lower().translate(_CYRILLIC)


def _persona(count: int) -> list[Pair]:
    name, role, maker = _PERSONA
    asked = ("Who are you?", "What is your name?", "Who made you?", "What do you do?", "Are you a person?", "Hello!")
    polite = ("", " Tell me.", " I wonder.", " Please.", " My friend asks.", " In one sentence.", " Be honest.")
    said = (
        f"I am {name}, {role}.",
        f"I am {name}.",
        f"I was made {maker}; I am {name}.",
        f"I am {name} and help guests.",
    )
    return [
        (
            f"{asked[index % len(asked)]}{polite[index // len(asked) % len(polite)]} ({index})",
            said[index % len(asked) % 4],
        )
        for index in range(count)
    ]


def _random_words(pairs: Sequence[Pair]) -> list[Pair]:
    words = sorted({word for _, answer in pairs for word in answer.split()})
    drawn = random.Random(3)
    return [(prompt, " ".join(drawn.choices(words, k=len(answer.split())))) for prompt, answer in pairs]
