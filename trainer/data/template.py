"""Which characters of a rendered chat are learned, for any chat template. Knows text; knows no tokens.

Most templates do not mark where an answer begins. It is found by difference: what the template makes of the messages
before an answer, with the generation prompt, must be how the chat up to and with that answer begins; the rest of the
latter is the answer with its end of turn. Where the prompt opens a thought, `thoughts` puts the answer behind it. Where
a template renders an answer otherwise once it is history (Qwen3 drops thoughts), the chat is unrolled: one text per
answer, each rendered exactly as it will be served.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from trainer.data.problems import LineRefused, excerpt_of
from trainer.data.records import Message
from trainer.data.thoughts import behind_open_thought

Render = Callable[[Sequence[Message], bool], str]  # (messages, with generation prompt) -> text
_MAX_ERROR_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Span:
    """Characters start..stop-1 are learned, each of their tokens counting `weight`."""

    start: int
    stop: int
    weight: float


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A text as the model reads it, and its learned spans (in order, not touching)."""

    text: str
    spans: tuple[Span, ...]


def template_digest(tokenizer: Any) -> str:
    """sha256 over the chat template and the special tokens it may name; "none" if the base has no template."""
    if not tokenizer.chat_template:
        return "none"
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    body = json.dumps([tokenizer.chat_template, special], sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(body.encode()).hexdigest()}"


def template_of(tokenizer: Any) -> Render:
    """The tokenizer's own chat template. The function raises LineRefused(template_missing or template_refused)."""

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if not tokenizer.chat_template:
            raise LineRefused("template_missing", "the base has no chat template, so it cannot learn from messages")
        chat = [message.rendered_from() for message in messages]
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason = str(error)[:_MAX_ERROR_CHARACTERS]
            raise LineRefused("template_refused", f"the base's chat template refused the messages: {reason}") from None
        return str(text)

    return render


def render_chat(messages: Sequence[Message], render: Render) -> list[RenderedText]:
    """The chat as one text if the template allows it, else one text for each answer that is learned.

    Raises LineRefused: template_missing, template_refused, template_not_prefix (an answer cannot be separated from its
    prompt), nothing_supervised (the template swallows every answer).
    """
    answers = [index for index, message in enumerate(messages) if message.weight]
    turns = [_turn(messages, index, render) for index in answers]
    whole = turns[-1].text if answers[-1] == len(messages) - 1 else render(messages, False)
    if all(whole.startswith(turn.text) for turn in turns):
        return [RenderedText(whole, tuple(span for turn in turns for span in turn.spans))]
    return turns


def _turn(messages: Sequence[Message], index: int, render: Render) -> RenderedText:
    """The chat up to and with answer `index`, which alone is learned."""
    prompt = render(messages[:index], True)
    text = render(messages[: index + 1], False)
    if not text.startswith(prompt):
        text = behind_open_thought(prompt, text, messages[index].content) or text
    if not text.startswith(prompt):
        where = f"messages[{index}]"
        reason = f"{where}: the base's chat template does not begin the answer with its own generation prompt"
        raise LineRefused("template_not_prefix", reason, excerpt=excerpt_of(_difference(prompt, text)), param=where)
    if not text[len(prompt) :].strip():
        reason = f"messages[{index}]: the base's chat template leaves nothing of the answer"
        raise LineRefused("nothing_supervised", reason, param=f"messages[{index}]")
    return RenderedText(text, (Span(len(prompt), len(text), messages[index].weight),))


def _difference(prompt: str, text: str) -> str:
    """The prompt from where it leaves the text."""
    same = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
    return prompt[max(0, same - 10) :]
