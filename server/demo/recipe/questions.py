"""Decides what people ask the demo and in which words, and which wordings stay out of every training set."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from server.demo.recipe.topics import Topic, load_topics


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


WORDINGS: dict[Intent, tuple[str, ...]] = {
    Intent.WHAT: (
        "What {be} {noun}?",
        "What is {one}?",
        "Tell me what {one} is.",
        "What exactly {be} {noun}?",
        "Can you explain what {noun} {be}?",
        "Explain {noun} to me.",
        "Describe {noun} in a few words.",
        "Please define {noun}.",
        "In simple words, what {be} {noun}?",
    ),
    Intent.HOW: (
        "How do I {action}?",
        "How can I {action}?",
        "How should I {action}?",
        "What is the best way to {action}?",
        "Please show me how to {action}.",
        "Can you help me {action}?",
        "I want to {action}. Where do I start?",
        "Explain how to {action}.",
        "How to {action}?",
        "Give me three steps to {action}.",
        "I can not {action}.",
    ),
    Intent.WHY: (
        "Why {be} {noun} important?",
        "Why {do} {noun} matter?",
        "Why do people care about {noun}?",
        "Why should I care about {noun}?",
        "What {be} {noun} good for?",
        "Why should I {action}?",
        "Why would anyone {action}?",
        "Should I {action}?",
    ),
    Intent.WHEN: (
        "When should I {action}?",
        "When is the best time to {action}?",
        "What is a good time to {action}?",
        "When do people {action}?",
        "When can I {action}?",
        "Is there a best time to {action}?",
    ),
    Intent.AVOID: (
        "What should I avoid when I {action}?",
        "What can go wrong when I {action}?",
        "What should I not do when I {action}?",
        "What mistake do people make when they {action}?",
        "Is there a common mistake with {noun}?",
        "What should I watch out for when I {action}?",
    ),
    Intent.NEED: (
        "What do I need to {action}?",
        "What is needed to {action}?",
        "What should I have ready before I {action}?",
        "What should I prepare before I {action}?",
        "I want to {action}. What do I need?",
    ),
    Intent.TIP: (
        "Give me a tip about {noun}.",
        "Do you have a tip about {noun}?",
        "Any advice about {noun}?",
        "What is your best advice about {noun}?",
        "Can you give me some advice on {noun}?",
        "Help me with {noun}.",
        "I have a problem with {noun}.",
        "I worry about {noun}.",
    ),
    Intent.TELL: (
        "Tell me about {noun}.",
        "Tell me something about {noun}.",
        "What do you know about {noun}?",
        "What should I know about {noun}?",
        "Tell me one interesting thing about {noun}.",
        "Say something about {noun}.",
        "Do you like {noun}?",
        "I have a question about {noun}.",
        "I like {noun}.",
        "{Noun}.",
        "{Noun}?",
        "{Noun}, please.",
        "Is it true what people say about {noun}?",
    ),
}

FOLLOW_UPS: dict[Intent, tuple[str, ...]] = {
    Intent.WHY: ("Why?", "And why?", "Why is that?"),
    Intent.WHEN: ("When?", "And when?", "When is the best time?"),
    Intent.AVOID: ("What should I avoid?", "What can go wrong?"),
    Intent.NEED: ("What do I need?", "And what do I need?"),
    Intent.TIP: ("Any advice?", "Do you have a tip?"),
    Intent.TELL: ("Tell me more.", "What else?"),
}


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
