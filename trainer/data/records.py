"""One training record, and one line's way to it: strict about keys, roles and contents. Knows no files, no tokens.

Three kinds: {"messages": [...]}, {"prompt": ..., "completion": ...}, {"text": ...}. A null key counts as absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from adapters_store.parsing.numbers import is_within
from adapters_store.parsing.strict_json import parse_strict_json
from trainer.data.problems import LineRefused, excerpt_of, excerpt_of_bytes

Kind = Literal["chat", "completion", "text"]
MAX_MESSAGES = 4096
ROLES = ("system", "user", "assistant")
_TOOL_KEYS = frozenset(
    {"tools", "functions", "tool_calls", "function_call", "tool_call_id", "parallel_tool_calls", "tool_choice"}
)
_KEYS: dict[frozenset[str], Kind] = {
    frozenset({"messages"}): "chat",
    frozenset({"prompt", "completion"}): "completion",
    frozenset({"text"}): "text",
}
_MESSAGE_KEYS = frozenset({"role", "content", "weight"})


@dataclass(frozen=True, slots=True)
class Message:
    """weight: what learning this message counts, 0 to 1; always 0 if the role is not the assistant's."""

    role: str
    content: str
    weight: float

    def rendered_from(self) -> dict[str, str]:
        """What a chat template reads."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Record:
    """One example as text. chat: `messages`; completion: `prompt` and `completion`; text: `completion` alone."""

    kind: Kind
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""

    def digest(self) -> bytes:
        """16 bytes over the content, the same for two lines that differ in spacing or key order only."""
        messages = [[message.role, message.content, message.weight] for message in self.messages]
        body = json.dumps([self.kind, messages, self.prompt, self.completion], ensure_ascii=False)
        return hashlib.blake2b(body.encode("utf-8"), digest_size=16).digest()


def parse_record(line: bytes) -> Record:
    """The record of one line. Raises LineRefused with a code, a message and an excerpt."""
    body = _parse_object(line)
    present = _without_nulls(body)
    if frozenset(present) in _KEYS:
        body = present
    kind = _KEYS.get(frozenset(body))
    if kind == "chat":
        return Record("chat", messages=_messages(body["messages"]))
    if kind == "completion":
        return Record(
            "completion",
            prompt=_text(body["prompt"], "prompt"),
            completion=_text(body["completion"], "completion"),
        )
    if kind == "text":
        return Record("text", completion=_text(body["text"], "text"))
    raise _wrong_keys(present or body)


def _without_nulls(body: Mapping[str, object]) -> dict[str, object]:
    """The keys with a value: exported tables hold null for every column that only other examples have."""
    return {key: value for key, value in body.items() if value is not None}


def _parse_object(line: bytes) -> dict[str, object]:
    def refused(code: str, message: str) -> LineRefused:
        return LineRefused(code, message, excerpt=excerpt_of_bytes(line))

    body = parse_strict_json(
        line, what="the line", max_objects=MAX_MESSAGES * 2, refused=refused, too_many="too_many_messages"
    )
    if not isinstance(body, dict):
        raise LineRefused(
            "not_an_object", f"a line must be a JSON object, got {type(body).__name__}", excerpt=excerpt_of(body)
        )
    return body


def _wrong_keys(body: Mapping[str, object]) -> LineRefused:
    """Names the wrong key, compared with the kind that the line resembles most."""
    for key in body:
        if key in _TOOL_KEYS:
            return LineRefused("unsupported_tools", f"{key}: training on tool calls is not supported", param=key)
    if not body:
        return LineRefused(
            "missing_key", 'the object is empty; "messages", "prompt" and "completion", or "text" needed'
        )
    nearest = max(_KEYS, key=lambda keys: len(keys & body.keys()))
    unknown = [key for key in body if key not in nearest]
    if unknown:
        known = " and ".join(sorted(nearest)) if nearest & body.keys() else "messages, prompt and completion, or text"
        return LineRefused(
            "unknown_key", f"unknown key {excerpt_of(unknown[0])}; known: {known}", excerpt=excerpt_of(list(body))
        )
    missing = min(nearest - body.keys())
    return LineRefused("missing_key", f"{missing} is missing", param=missing)


def _text(value: object, param: str) -> str:
    if not isinstance(value, str):
        raise LineRefused(
            "wrong_type", f"{param} must be a string, got {_type_name(value)}", excerpt=excerpt_of(value), param=param
        )
    if not value.strip():
        raise LineRefused("empty_content", f"{param} is empty", excerpt=excerpt_of(value), param=param)
    if not value.isascii():
        _check_unicode(value, param)
    return value


def _check_unicode(value: str, param: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        piece = excerpt_of(value[max(0, error.start - 20) : error.start + 20])
        message = f"{param} is not valid Unicode: a lone surrogate at character {error.start}"
        raise LineRefused("not_unicode", message, excerpt=piece, param=param) from None


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise LineRefused("wrong_type", f"messages must be a list, got {_type_name(value)}", param="messages")
    if not value:
        raise LineRefused("no_assistant", "messages is empty", param="messages")
    messages = tuple(_message(item, f"messages[{index}]") for index, item in enumerate(value))
    _check_order(messages)
    return messages


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise LineRefused("wrong_type", f"{where} must be an object, got {_type_name(value)}", param=where)
    value = {"content": None, **_without_nulls(value)} if "content" in value else _without_nulls(value)
    if not value.keys() <= _MESSAGE_KEYS:
        raise _wrong_message_key(value, where)
    role = value.get("role")
    if role not in ROLES:
        raise _wrong_role(role, where)
    if "content" not in value:
        raise LineRefused("missing_key", f"{where}.content is missing", param=f"{where}.content")
    content = _text(_joined_parts(value["content"], f"{where}.content"), f"{where}.content")
    return Message(str(role), content, _weight(value, where) if "weight" in value else float(role == "assistant"))


def _wrong_message_key(value: Mapping[str, object], where: str) -> LineRefused:
    key = next(key for key in value if key not in _MESSAGE_KEYS)
    if key in _TOOL_KEYS:
        return LineRefused("unsupported_tools", f"{where}.{key}: training on tool calls is not supported", param=where)
    return LineRefused(
        "unknown_key", f"{where}: unknown key {excerpt_of(key)}; known: role, content, weight", param=where
    )


def _wrong_role(role: object, where: str) -> LineRefused:
    param = f"{where}.role"
    if role in ("tool", "function"):
        return LineRefused("unsupported_tools", f"{param}: training on tool calls is not supported", param=param)
    message = f"{param} must be one of {', '.join(ROLES)}"
    return LineRefused("wrong_role", f"{message}, got {excerpt_of(role)}", excerpt=excerpt_of(role), param=param)


def _joined_parts(content: object, where: str) -> object:
    """A list of text parts as one string, as the server joins them; anything else as it is."""
    if not isinstance(content, list):
        return content
    for index, part in enumerate(content):
        if not isinstance(part, dict) or _without_nulls(part).keys() != {"type", "text"} or part["type"] != "text":
            raise LineRefused("unsupported_content", f"{where}[{index}] must be a text part", excerpt=excerpt_of(part))
        _text(part["text"], f"{where}[{index}].text")
    return "".join(part["text"] for part in content)


def _weight(value: Mapping[str, object], where: str) -> float:
    weight = value["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise LineRefused("bad_weight", f"{where}.weight must be a number", excerpt=excerpt_of(weight), param=where)
    if not is_within(weight, 0, 1):
        raise LineRefused("bad_weight", f"{where}.weight must be from 0 to 1, got {excerpt_of(weight)}", param=where)
    if value["role"] != "assistant":
        raise LineRefused("bad_weight", f"{where}.weight: only an assistant's message has a weight", param=where)
    return float(weight)


def _check_order(messages: tuple[Message, ...]) -> None:
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise LineRefused("no_assistant", "no message is the assistant's: nothing to learn", param="messages")
    if "system" in roles[1:]:
        where = f"messages[{roles.index('system', 1)}].role"
        raise LineRefused("wrong_role", f"{where}: only the first message may be the system's", param=where)
    if roles[: roles.index("assistant")][-1:] != ["user"]:
        raise LineRefused("wrong_role", "the assistant speaks before any user does", param="messages")
    if roles[-1] != "assistant":
        raise LineRefused(
            "wrong_role", f"the last message must be the assistant's, not {roles[-1]}'s", param="messages"
        )
    if not any(message.weight for message in messages):
        raise LineRefused("nothing_supervised", "every assistant's message has weight 0", param="messages")


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__
