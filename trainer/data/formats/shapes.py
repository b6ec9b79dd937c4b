"""What a record means: the shapes that people bring, as messages, prompt and completion, or text. Knows no files.

    as_example(body, columns) -> Example(shape, body, notes)

A key that says nothing about the text (an id, a source) is left out with a note. What would change the meaning is
refused: preference pairs, images, columns that no shape explains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.data.formats.messages import cleaned, from_turns
from trainer.data.problems import LineRefused, excerpt_of

Body = dict[str, Any]
ROLES = ("system", "context", "user", "assistant")  # what --map assigns columns to
_CHAT_KEYS = frozenset({"messages", "tools", "functions", "parallel_tool_calls"})
_PREFERENCES = (
    {"chosen", "rejected"},
    {"preferred_output", "non_preferred_output"},
    {"prompt", "completion", "label"},
)
_MEANINGFUL = frozenset(
    [
        "context",
        "choices",
        "options",
        "input",
        "inputs",
        "system",
        "system_prompt",
        "history",
        "label",
        "labels",
        "image",
        "images",
        "audio",
        "video",
        "tools",
        "functions",
        "tool_calls",
        "target",
        "targets",
        "answers",
    ]
)
# (name, user, what follows the user's text, assistant)
_COLUMNS = (
    ("Alpaca", "instruction", "input", "output"),
    ("Dolly", "instruction", "context", "response"),
    ("instruction and response", "instruction", "input", "response"),
    ("question and answer", "question", None, "answer"),
    ("question and response", "question", None, "response"),
    ("prompt and response", "prompt", None, "response"),
    ("query and response", "query", None, "response"),
    ("query and answer", "query", None, "answer"),
    ("problem and solution", "problem", None, "solution"),
    ("input and output", "input", None, "output"),
    ("user and assistant", "user", None, "assistant"),
)


@dataclass
class Example:
    """shape: the name of what it was. body: what the trainer reads. notes: what was changed or left out."""

    shape: str
    body: Body
    notes: list[str] = field(default_factory=list)


def as_example(body: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
    """columns: a column's name for some of ROLES; empty: the shape is recognised. Raises LineRefused."""
    body = {key: value for key, value in body.items() if value is not None}
    if columns:
        return _mapped(body, columns)
    if any(keys <= body.keys() for keys in _PREFERENCES):
        message = "preference data (chosen and rejected answers) is not trained here; map the chosen answers as a chat"
        raise LineRefused("preference_data", message, excerpt=excerpt_of(list(body)))
    for recognise in (_chat, _turns, _conversational, _plain, _columns):
        example = recognise(body)
        if example is not None:
            return example
    raise _unknown(body)


def _unknown(body: Body) -> LineRefused:
    message = (
        f"no format is recognised in the keys {excerpt_of(list(body))}; name columns: --map user=...,assistant=..."
    )
    return LineRefused("unknown_format", message, excerpt=excerpt_of(list(body)))


def _chat(body: Body) -> Example | None:
    if "messages" not in body:
        return None
    example = Example("messages", {key: body[key] for key in body if key in _CHAT_KEYS})
    example.body["messages"] = cleaned(_parsed(body["messages"]), example.notes)
    _prepend_system(example, body.get("system"))
    return _left_out(example, body, {*_CHAT_KEYS, "system"})


def _turns(body: Body) -> Example | None:
    """ShareGPT: `from` and `value`; some files have roles and contents under the same key."""
    key = next((key for key in ("conversations", "conversation") if key in body), None)
    if key is None:
        return None
    if "tools" in body:
        raise LineRefused(
            "unsupported_tools", "tools beside `conversations` are not converted; write them as `messages`"
        )
    example = Example("ShareGPT", {})
    example.body["messages"] = cleaned(from_turns(_parsed(body[key]), key), example.notes)
    _prepend_system(example, body.get("system"))
    return _left_out(example, body, {key, "system"})


def _conversational(body: Body) -> Example | None:
    """TRL's prompt and completion as lists of messages: what stands in the prompt is not learned."""
    prompt, completion = _parsed(body.get("prompt")), _parsed(body.get("completion"))
    if not isinstance(prompt, list) or not isinstance(completion, list):
        return None
    notes: list[str] = []
    before = cleaned(prompt, notes, keep_tail=True)
    for message in before:
        if message.get("role") == "assistant":
            message["weight"] = 0
    example = Example(
        "conversational prompt and completion", {"messages": [*before, *cleaned(completion, notes)]}, notes
    )
    return _left_out(example, body, {"prompt", "completion"})


def _plain(body: Body) -> Example | None:
    if {"prompt", "completion"} <= body.keys():
        example = Example("prompt and completion", {key: body[key] for key in ("prompt", "completion")})
        return _left_out(example, body, example.body.keys())
    if "text" in body and not any(user in body and answer in body for _, user, _, answer in _COLUMNS):
        return _left_out(Example("text", {"text": body["text"]}), body, {"text"})
    return None


def _columns(body: Body) -> Example | None:
    fitting = [row for row in _COLUMNS if row[1] in body and row[3] in body]
    if not fitting:
        return None
    name, user, more, assistant = next((row for row in fitting if row[2] in body), fitting[0])
    columns = {"user": user, "assistant": assistant}
    if more in body:
        columns["context"] = str(more)
    system = next((key for key in ("system", "system_prompt") if key in body), None)
    if system is not None:
        columns["system"] = system
    example = _mapped(body, columns, strict=True)
    example.shape = name
    return example


def _mapped(body: Body, columns: Mapping[str, str], *, strict: bool = False) -> Example:
    texts = {role: _cell(body, column) for role, column in columns.items()}
    turns = _history(body.get("history")) if strict else []
    content = "\n\n".join(filter(None, (texts["user"], texts.get("context"))))
    system = texts.get("system")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [*turns, {"role": "user", "content": content}, {"role": "assistant", "content": texts["assistant"]}]
    example = Example("mapped columns", {"messages": messages})
    known = {*columns.values(), *(("history", "text") if strict else ())}
    return _left_out(example, body, known) if strict else example


def _cell(body: Body, column: str) -> str:
    value = body.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise LineRefused("wrong_type", f"{column} must be text, got {type(value).__name__}", param=column)
    return "" if value is None or not value.strip() else value


def _history(value: Any) -> list[Body]:
    """LLaMA-Factory's earlier turns: pairs of question and answer."""
    turns: list[Body] = []
    for pair in value or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise LineRefused("wrong_type", "history must be a list of [question, answer]", excerpt=excerpt_of(pair))
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _parsed(value: Any) -> Any:
    """Tables hold a list as its JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _prepend_system(example: Example, system: Any) -> None:
    """Raises LineRefused for two system messages, or one that is no text."""
    messages = example.body["messages"]
    if system is None or system == "":
        return
    if not isinstance(system, str) or (messages and messages[0]["role"] == "system"):
        raise LineRefused("wrong_type", "system must be text, and the only system message", excerpt=excerpt_of(system))
    messages.insert(0, {"role": "system", "content": system})


def _left_out(example: Example, body: Body, known: Any) -> Example:
    """Note the keys that say nothing about the text. Raises LineRefused for one that does."""
    for key in body:
        if key in known or body[key] in ("", [], {}):
            continue
        if key in _MEANINGFUL:
            message = f"{key} beside {example.shape} would be lost; name columns: --map user=...,assistant=..."
            raise LineRefused("unknown_key", message, excerpt=excerpt_of(body[key]), param=key)
        example.notes.append(f"key {excerpt_of(key)} left out")
    return example
