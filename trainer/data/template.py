"""Which characters of a rendered chat are learned, for any chat template. Knows text; knows no tokens.

Most templates do not mark where an answer begins. It is found by difference: what the template makes of the messages
before an answer, with the generation prompt, must be how the chat up to and with that answer begins; the rest of the
latter is the answer with its end of turn. If the prompt opens a thought, the answer is put behind the thought. If a
template renders an answer otherwise once it is history (Qwen3 drops thoughts), the chat is unrolled: one text per
answer, each rendered exactly as it will be served. Tools, calls and results are shown as the server shows them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from adapters_store.dialects.catalog import DIALECTS, dialect_of, tool_template
from adapters_store.dialects.dialect import Dialect, Marker, Tool
from adapters_store.dialects.rendering import with_tools
from adapters_store.parsing.template_sandbox import OwnersTemplates, chat_variables
from trainer.data.problems import LineRefused, excerpt_of
from trainer.data.records import Message

Render = Callable[[Sequence[Message], bool], str]  # (messages, with generation prompt) -> text
RenderWithTools = Callable[[Sequence[Message], Sequence[Tool], bool], str]
_MAX_ERROR_CHARACTERS = 200
_CLOSED_BY = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
}


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


def template_digest(tokenizer: Any, own: str | None = None) -> str:
    """sha256 over the chat template (own: in place of the base's) and the special tokens it may name; "none" without
    one."""
    template = own or tokenizer.chat_template
    if not template:
        return "none"
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    body = json.dumps([template, special], sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(body.encode()).hexdigest()}"


def dialect_for(tokenizer: Any, tool_dialect: str | None = None, own: str | None = None) -> Dialect:
    """The dialect of that name; None: the one that the server would choose for the chat template (own: in place of the
    tokenizer's)."""
    return DIALECTS[tool_dialect] if tool_dialect else dialect_of(own or tool_template(tokenizer.chat_template))


def template_of(tokenizer: Any, dialect: Dialect, own: str | None = None) -> RenderWithTools:
    """The tokenizer's chat template, or `own`, which is rendered where the server renders adapters' templates. The
    function raises LineRefused(template_missing or template_refused)."""
    template, apart = own or tool_template(tokenizer.chat_template), OwnersTemplates()

    def text_of(shown: list[dict[str, Any]], listed: list[dict[str, Any]] | None, add_generation_prompt: bool) -> str:
        if own is None:
            return str(
                tokenizer.apply_chat_template(
                    shown, tools=listed, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        special = tokenizer.special_tokens_map
        names = chat_variables(special, shown, listed, add_generation_prompt=add_generation_prompt)
        return apart.render(own, names)

    def render(messages: Sequence[Message], tools: Sequence[Tool], add_generation_prompt: bool) -> str:
        if not template:
            raise LineRefused("template_missing", "the base has no chat template, so it cannot learn from messages")
        chat = [message.rendered_from() for message in messages]
        try:
            shown, listed = with_tools(template, dialect, chat, [dict(tool) for tool in tools])
            return text_of(shown, listed, add_generation_prompt)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason, whose = str(error)[:_MAX_ERROR_CHARACTERS], "base's" if own is None else "spec's"
            message = f"the {whose} chat template refused the messages: {reason}"
            raise LineRefused("template_refused", message) from None

    return render


def check_calls(messages: Sequence[Message], dialect: Dialect) -> None:
    """Raises LineRefused(bad_tool_call) for calls that no answer in this dialect can hold."""
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if len(message.calls) > 1 and dialect.between is None:
            reason = f"an answer in the dialect {dialect.name} holds one call at most, got {len(message.calls)}"
            raise LineRefused("bad_tool_call", f"{where}.tool_calls: {reason}", param=where)
        if message.calls and message.content.strip() and not isinstance(dialect.trigger, Marker):
            reason = f"an answer in the dialect {dialect.name} is text or calls, not both"
            raise LineRefused("bad_tool_call", f"{where}: {reason}", excerpt=excerpt_of(message.content), param=where)


def render_chat(messages: Sequence[Message], render: Render) -> list[RenderedText]:
    """The chat as one text if the template allows it, else one text for each answer that is learned.

    Raises LineRefused: template_missing, template_refused, template_not_prefix (an answer cannot be separated from its
    prompt), template_omits, nothing_supervised (the template swallows every answer).
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
        text = _behind_open_thought(prompt, text, messages[index]) or text
    if not text.startswith(prompt):
        where = f"messages[{index}]"
        reason = f"{where}: the base's chat template does not begin the answer with its own generation prompt"
        raise LineRefused("template_not_prefix", reason, excerpt=excerpt_of(_difference(prompt, text)), param=where)
    if not text[len(prompt) :].strip():
        reason = f"messages[{index}]: the base's chat template leaves nothing of the answer"
        raise LineRefused("nothing_supervised", reason, param=f"messages[{index}]")
    _check_shown(messages[index], text[len(prompt) :], f"messages[{index}]")
    return RenderedText(text, (Span(len(prompt), len(text), messages[index].weight),))


def _check_shown(message: Message, answer: str, where: str) -> None:
    """Templates may drop what they do not know: nothing of a call or a thought is left out in silence."""
    if not message.calls and not message.reasoning:
        return
    parts = {"content": [message.content], "reasoning_content": [message.reasoning]}
    parts["tool_calls"] = [call.name for call in message.calls]
    for field, texts in parts.items():
        missing = next((text for text in texts if text.strip() not in answer), None)
        if missing is not None:
            reason = f"{where}.{field}: the base's chat template does not show it in the answer"
            raise LineRefused("template_omits", reason, excerpt=excerpt_of(missing), param=where)


def _difference(prompt: str, text: str) -> str:
    """The prompt from where it leaves the text."""
    same = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
    return prompt[max(0, same - 10) :]


def _behind_open_thought(prompt: str, text: str, answer_message: Message) -> str | None:
    """The chat with its last answer, which is this message, as it continues `prompt`. A prompt that ends in "<think>"
    (DeepSeek-R1, QwQ, Qwen3-Thinking) is served so, while the template drops thoughts of history: the answer comes
    behind the thought that the message brings, or behind none, closed at once.

    text: the template's own rendering of the same chat. None: the prompt opens no thought, or the two differ in more.
    """
    opening = next((tag for tag in _CLOSED_BY if prompt.rstrip().endswith(tag)), None)
    if opening is None:
        return None
    before = prompt[: prompt.rindex(opening)]
    if not text.startswith(before):
        return None
    closing, answer = _CLOSED_BY[opening], text[len(before) :].lstrip("\n")
    if not answer.strip():
        return prompt
    if answer.startswith(opening) or closing in answer:  # the template keeps thoughts, in spacing of its own
        return prompt + answer.removeprefix(opening).lstrip("\n")
    brought = answer_message.reasoning or answer_message.content.rpartition(closing)[0]
    thought = brought.strip().removeprefix(opening).strip("\n")
    return f"{prompt}{thought}\n{closing}\n\n{answer}"
