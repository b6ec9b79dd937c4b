"""The questions that people ask the demo, and which wordings stay out of every training set."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from server.demo.recipe.texts import WORDINGS, Intent, Topic, load_topics


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and what it asks about."""

    prompt: str
    topic: Topic
    intent: Intent

    @property
    def held_out(self) -> bool:
        """Whether this wording, in any case, with any last mark, stays out of every training set (one in twelve)."""
        words = self.prompt.lower().rstrip("?.")
        return hashlib.sha256(words.encode()).digest()[0] < 256 // 12


def questions(topics: list[Topic] | None = None) -> Iterator[Question]:
    """Every question there is: topic x intent x wording, in a fixed order."""
    for topic in load_topics() if topics is None else topics:
        for intent, wordings in WORDINGS.items():
            for wording in wordings:
                yield Question(wording.format_map(topic.fields), topic, intent)


def held_out_questions(count: int, seed: int = 0) -> list[Question]:
    """`count` questions that no training set holds, spread over topics and intents."""
    kept_out = [question for question in questions() if question.held_out]
    if count > len(kept_out):
        raise ValueError(f"count must be at most {len(kept_out)}, got {count}")
    return random.Random(seed).sample(kept_out, count)


def casual(prompt: str, rng: random.Random) -> str:
    """The prompt as people type it: now and then in lower case, without its last mark, or after a greeting."""
    if rng.random() < 0.15:
        prompt = prompt[:1].lower() + prompt[1:]
    if rng.random() < 0.15:
        prompt = prompt.rstrip("?.")
    if rng.random() < 0.06:
        prompt = rng.choice(("Hi, ", "Hello. ", "Please tell me: ", "Excuse me, ")) + prompt
    return prompt
