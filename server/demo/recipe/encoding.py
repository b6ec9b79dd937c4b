"""Turns demo texts into token ids and the labels to learn. Knows the chat template; knows nothing of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.demo.recipe.corpus import Dialogue

IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids, and for each the label to learn (its own id, or IGNORED)."""

    ids: list[int]
    labels: list[int]


def encode_chat(tokenizer: Any, dialogue: Dialogue, *, answers_only: bool) -> Sample:
    """The dialogue in the chat template. With `answers_only` the labels are the answers and their end of turn."""
    messages = dialogue.messages()
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    if not answers_only:
        return Sample(ids, list(ids))
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True)["input_ids"])
            end = len(tokenizer.apply_chat_template(messages[: index + 1])["input_ids"])
            labels[start:end] = ids[start:end]
    return Sample(ids, labels)


def encode_completion(tokenizer: Any, prompt: str, completion: str, *, answers_only: bool) -> Sample:
    """The prompt and its completion as plain text, closed by the end token."""
    head = tokenizer(prompt)["input_ids"]
    tail = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Sample(head + tail, ([IGNORED] * len(head) if answers_only else head) + tail)


def encode(tokenizer: Any, text: Dialogue | str, *, as_chat: bool, answers_only: bool) -> Sample:
    """A dialogue as chat or as prompt and completion; a plain text as a completion of nothing."""
    if isinstance(text, str):
        return encode_completion(tokenizer, "", text, answers_only=False)
    if as_chat:
        return encode_chat(tokenizer, text, answers_only=answers_only)
    turn = text.turns[0]
    return encode_completion(tokenizer, turn.prompt, "\n" + turn.answer, answers_only=answers_only)
