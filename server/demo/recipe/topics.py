"""Reads the everyday facts that the demo's texts are made of. Knows grammar; knows nothing of questions or manners."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

TOPICS_FOLDER = Path(__file__).parents[1] / "assets" / "topics"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True, kw_only=True)
class Topic:
    """One everyday subject. No field addresses the reader, so every manner can use it.

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


def load_topics(folder: Path = TOPICS_FOLDER) -> list[Topic]:
    """All topics of a folder of TOML files, in file and table order. A missing field raises TypeError by its name."""
    topics = []
    for path in sorted(folder.glob("*.toml")):
        for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
            optional = {"noun": name, "plural": False, "one": ""}
            topics.append(Topic(**(optional | table | {"steps": tuple(table["steps"])})))
    return topics
