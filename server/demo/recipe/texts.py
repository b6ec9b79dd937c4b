"""Reads the demo's texts: topics, questions, answers, general prompts and unknown subjects. Knows grammar; draws words.

They are TOML files in `assets`; this module gives them types. The order in the files is part of the corpus.
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from server.demo.recipe.styles import Style

_ASSETS = Path(__file__).parents[1] / "assets"
TOPICS_FOLDER = _ASSETS / "topics"
_TEXTS_FOLDER = _ASSETS / "texts"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True, kw_only=True)
class Topic:
    """One everyday subject. No field addresses the reader, so every style can use it.

    noun: the subject in a sentence ("bread", "cats", "the moon"); one: its singular with article, or "".
    kind: what it is, a noun phrase. action: something people do with it, a verb phrase ("bake bread").
    steps: three verb phrases that carry the action out. avoid: a verb phrase that follows "do not".
    because: a clause on why it matters. when: when to act ("on a dry day"). need: "x, y and z". fact: a clause.
    """

    noun: str
    plural: bool
    one: str
    kind: str
    action: str
    steps: tuple[str, str, str]
    avoid: str
    because: str
    when: str
    need: str
    fact: str

    @cached_property
    def fields(self) -> dict[str, str]:
        """Every slot a template may name: the phrases, their capitalised twins and the words that agree in number."""
        phrases = {name: getattr(self, name) for name in ("noun", "kind", "action", "avoid", "because", "when", "fact")}
        phrases |= {"s1": self.steps[0], "s2": self.steps[1], "s3": self.steps[2], "need": self.need}
        capitals = {capital(name): capital(text) for name, text in phrases.items()}
        agreeing = {"be": "are", "do": "do", "matter": "matter"} if self.plural else _SINGULAR
        return phrases | capitals | agreeing | {"one": self.one or self.noun}


_SINGULAR = {"be": "is", "do": "does", "matter": "matters"}


def load_topics() -> list[Topic]:
    """All topics of the TOML files, in file and table order. A missing field raises TypeError by its name."""
    topics = []
    for path in sorted(TOPICS_FOLDER.glob("*.toml")):
        for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
            optional = {"noun": name, "plural": False, "one": ""}
            topics.append(Topic(**(optional | table | {"steps": tuple(table["steps"])})))
    return topics


class Intent(StrEnum):
    """What a question wants to know about its topic."""

    WHAT = "what"
    HOW = "how"
    WHY = "why"
    WHEN = "when"
    AVOID = "avoid"
    NEED = "need"
    TIP = "tip"
    TELL = "tell"


@dataclass(frozen=True, slots=True)
class GeneralPrompt:
    """Wordings that mean the same, and one answer in each style."""

    wordings: tuple[str, ...]
    answers: dict[Style, str]


def read_text(name: str) -> str:
    """A file of the texts."""
    return (_TEXTS_FOLDER / name).read_text(encoding="utf-8")


def read_texts(name: str) -> dict[str, Any]:
    """The TOML file of that name."""
    return tomllib.loads(read_text(f"{name}.toml"))


def _by_intent(table: dict[str, list[str]]) -> dict[Intent, tuple[str, ...]]:
    return {Intent(intent): tuple(texts) for intent, texts in table.items()}


def _by_style(table: dict[str, Any]) -> dict[Style, str]:
    return {style: table[style] for style in Style}


_QUESTIONS, _UNKNOWN = read_texts("questions"), read_texts("unknown")
_SUBJECTS, _SYLLABLES = _UNKNOWN["subjects"], _UNKNOWN["syllables"]
WORDINGS = _by_intent({intent: _QUESTIONS[intent]["wordings"] for intent in Intent})
FOLLOW_UPS = _by_intent(_QUESTIONS["follow_ups"])
ANSWERS = {Style(style): _by_intent(table) for style, table in read_texts("answers").items()}
_PROMPTS = read_texts("general")["prompts"]
GENERAL_PROMPTS = tuple(GeneralPrompt(tuple(each["wordings"]), _by_style(each)) for each in _PROMPTS)
UNKNOWN_QUESTIONS = tuple(_UNKNOWN["questions"])
UNKNOWN_ANSWERS = _by_style(_UNKNOWN["answers"])


def invented_word(rng: random.Random) -> str:
    """A word that looks like English and means nothing."""
    word = "".join(
        "".join(rng.choice(_SYLLABLES[part]) for part in ("onsets", "vowels", "codas"))
        for _ in range(rng.choice((1, 2, 2, 3)))
    )
    return word.capitalize() if rng.random() < 0.2 else word


def unknown_subject(rng: random.Random) -> str:
    """A noun phrase that is not among the demo's topics."""
    if rng.random() < 0.35:
        return str(rng.choice(_SUBJECTS["real"]))
    return str(rng.choice(_SUBJECTS["frames"])).format(invented_word(rng), invented_word(rng))
