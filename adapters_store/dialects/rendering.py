"""Shows tools, calls and results to a model whose chat template shows none. Knows a dialect; knows no template.

The texts are part of the prompt that an adapter learns and is served, so both use these functions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from adapters_store.dialects.catalog import native_dialect
from adapters_store.dialects.dialect import MAX_CALL_ID_CHARS, PLAIN_ID_CHARS, Dialect, Tool

Message = Mapping[str, Any]


def with_tools(
    template: str, dialect: Dialect | None, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as the template shows them: its own way if that is the dialect, else in turns of text."""
    if not tools and not any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        return messages, None
    if dialect is None or native_dialect(template) is dialect:
        return with_arguments_read(_with_fitting_ids(messages, dialect)), tools or None
    return plain_turns(dialect, messages, tools), None


def with_arguments_read(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """For a template that shows calls itself: arguments as objects, since templates write them as JSON."""
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def plain_turns(dialect: Dialect, messages: Sequence[Message], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The same conversation in turns of system, user and assistant alone. Results that follow each other share a turn:
    many templates want the roles to alternate."""
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in messages:
        calls = message.get("tool_calls") or ()
        names |= {call["id"]: call["function"]["name"] for call in calls}
        if message["role"] == "tool":
            _add_result(turns, dialect, message, names)
        elif calls:
            written = dialect.written([_spelled(call["function"]) for call in calls])
            content = f"{message['content']}\n{written}" if message["content"] else written
            turns.append({"role": "assistant", "content": content})
        else:
            turns.append({key: value for key, value in message.items() if key != "tool_calls"})
    return _instructed(turns, dialect, tools) if tools else turns


def _spelled(function: Mapping[str, Any]) -> tuple[str, str]:
    """Name and arguments with the blanks that the grammar of answers has, whatever wrote the call."""
    return function["name"], json.dumps(json.loads(function["arguments"]), ensure_ascii=False)


def _with_fitting_ids(messages: list[dict[str, Any]], dialect: Dialect | None) -> list[dict[str, Any]]:
    """Ids of another form than the dialect's template takes (Mistral's: nine letters and digits) in that form."""
    length = MAX_CALL_ID_CHARS if dialect is None else dialect.call_id_chars
    if length >= PLAIN_ID_CHARS:
        return messages

    def fitting(id_: str) -> str:
        is_fit = len(id_) == length and id_.isascii() and id_.isalnum()
        return id_ if is_fit else hashlib.sha256(id_.encode("utf-8", "surrogatepass")).hexdigest()[:length]

    return [
        {
            **message,
            **({"tool_call_id": fitting(message["tool_call_id"])} if "tool_call_id" in message else {}),
            **({"tool_calls": [{**call, "id": fitting(call["id"])} for call in calls]} if calls else {}),
        }
        for message, calls in ((each, each.get("tool_calls")) for each in messages)
    ]


def _add_result(turns: list[dict[str, Any]], dialect: Dialect, message: Message, names: Mapping[str, str]) -> None:
    name = message.get("name") or names.get(message["tool_call_id"], "tool")
    text = dialect.result.replace("{name}", name, 1).replace("{content}", message["content"], 1)
    if turns and turns[-1].get("is_result"):
        turns[-1]["content"] += f"\n{text}"
    else:
        turns.append({"role": dialect.result_role, "content": text, "is_result": True})


def _instructed(turns: list[dict[str, Any]], dialect: Dialect, tools: Sequence[Tool]) -> list[dict[str, Any]]:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    form = dialect.written([("NAME", "ARGUMENTS")])
    text = dialect.instructions.replace("{form}", form)
    text = text.replace("{tools}", listed) if "{tools}" in text else f"{text}\n{listed}"
    role = "user" if dialect.in_first_user_turn else "system"
    place = next((at for at, turn in enumerate(turns) if turn["role"] == role), None)
    if place is None:
        return [{"role": role, "content": text}, *turns]
    before, after = (turns[place]["content"], text) if role == "system" else (text, turns[place]["content"])
    return [*turns[:place], {**turns[place], "content": f"{before}\n\n{after}"}, *turns[place + 1 :]]


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
