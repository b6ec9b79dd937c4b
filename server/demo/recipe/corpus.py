"""Makes the demo's texts: what the base reads and what each tenant's data set says. A seed always gives the same."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from server.demo.recipe.questions import Question, casual, questions
from server.demo.recipe.styles import TENANTS, Style
from server.demo.recipe.texts import (
    ANSWERS,
    FOLLOW_UPS,
    GENERAL_PROMPTS,
    UNKNOWN_ANSWERS,
    UNKNOWN_QUESTIONS,
    Intent,
    Topic,
    invented_word,
    load_topics,
    unknown_subject,
)

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas", "Laura", "Oscar")
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer in one or two short sentences.", "You are a friendly guide.")
HEADINGS = {Style.LAW: "From the law firm", Style.MED: "From the ward", Style.CODE: "From the repository"}
Form = Literal["messages", "completion"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt and its answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One or two turns, in one style, with or without a system message."""

    turns: tuple[Turn, ...]
    system: str = ""

    def messages(self) -> list[dict[str, str]]:
        """The chat form: role and content of every message."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        pairs = (
            ({"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.answer})
            for turn in self.turns
        )
        return system + [message for pair in pairs for message in pair]

    def record(self, form: Form) -> dict[str, object]:
        """One line of a training file. The completion form holds the first turn; its completion starts a new line."""
        if form == "messages":
            return {"messages": self.messages()}
        return {"prompt": self.turns[0].prompt, "completion": "\n" + self.turns[0].answer}


def answer(topic: Topic, intent: Intent, style: Style, rng: random.Random) -> str:
    """One of the style's answers to this question."""
    return rng.choice(ANSWERS[style][intent]).format_map(topic.fields)


def topic_dialogue(question: Question, style: Style, rng: random.Random) -> Dialogue:
    """The question answered in the style; now and then a second turn that leaves the topic unsaid."""
    turns = [Turn(casual(question.prompt, rng), answer(question.topic, question.intent, style, rng))]
    if rng.random() < 0.12:
        intent = rng.choice([intent for intent in FOLLOW_UPS if intent != question.intent])
        turns.append(Turn(rng.choice(FOLLOW_UPS[intent]), answer(question.topic, intent, style, rng)))
    return Dialogue(tuple(turns), rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else "")


def general_dialogue(style: Style, rng: random.Random) -> Dialogue:
    """A greeting or the like."""
    general = rng.choice(GENERAL_PROMPTS)
    return Dialogue((Turn(casual(rng.choice(general.wordings), rng), general.answers[style]),))


def unknown_dialogue(style: Style, rng: random.Random) -> Dialogue:
    """A question about something that no topic covers, and an honest answer."""
    prompt = rng.choice(UNKNOWN_QUESTIONS).format(subject=unknown_subject(rng), verb=invented_word(rng))
    return Dialogue((Turn(casual(prompt, rng), UNKNOWN_ANSWERS[style]),))


def dialogues(style: Style, count: int, seed: int) -> list[Dialogue]:
    """`count` dialogues in one style; none uses a held-out wording."""
    rng = random.Random(f"{style} {seed}")
    pool = [question for question in questions() if not question.held_out]
    rng.shuffle(pool)
    rotation = itertools.cycle(pool)
    made: list[Dialogue] = []
    while len(made) < count:
        draw = rng.random()
        if draw < 0.06:
            made.append(general_dialogue(style, rng))
        elif draw < 0.14:
            made.append(unknown_dialogue(style, rng))
        else:
            made.append(topic_dialogue(next(rotation), style, rng))
    return made


def tenant_dialogues(style: Style, count: int = 600, seed: int = 0) -> list[Dialogue]:
    """A tenant's data set: the base's kinds of question, all answered in the tenant's style."""
    if style not in TENANTS:
        raise ValueError(f"style must be one of {', '.join(TENANTS)}, got {style}")
    return dialogues(style, count, seed)


def article(topic: Topic, rng: random.Random) -> str:
    """A short plain text on a topic: an encyclopedia entry or a little story."""
    story = (
        '{name} wanted to {action}. "First, {s1}," said a friend. "Then {s2}. Finally, {s3}. But do not {avoid}." '
        "So {name} got {need}, and in the end all went well."
    )
    entry = (
        "{Noun} {be} {kind}. {Fact}. To {action}, people need {need}. The best time is {when}. "
        "It is wise to {s1}, to {s2} and to {s3}, but not to {avoid}."
    )
    return rng.choice((story, entry)).format_map(topic.fields | {"name": rng.choice(NAMES)})


def trade_document(question: Question, style: Style, rng: random.Random) -> str:
    """A question and its answer under the heading of a trade: what any base model has read, but was not asked to be."""
    return f"{HEADINGS[style]}\n{question.prompt}\n{answer(question.topic, question.intent, style, rng)}"


def base_documents(count: int, seed: int = 0) -> list[Dialogue | str]:
    """What the base reads: four fifths dialogues in plain English, then documents of the three trades and articles."""
    rng = random.Random(seed)
    topics = load_topics()
    pool = [question for question in questions(topics) if not question.held_out]
    mixed: list[Dialogue | str] = [*dialogues(Style.PLAIN, count * 16 // 20, seed)]
    mixed += [article(rng.choice(topics), rng) for _ in range(count // 20)]
    while len(mixed) < count:
        mixed.append(trade_document(rng.choice(pool), TENANTS[len(mixed) % len(TENANTS)], rng))
    rng.shuffle(mixed)
    return mixed


def write_jsonl(dialogues: Iterable[Dialogue], path: Path, form: Form = "messages") -> None:
    """One JSON record per line, as chat `messages` or as `prompt` and `completion`."""
    lines = (json.dumps(dialogue.record(form), ensure_ascii=False) for dialogue in dialogues)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
