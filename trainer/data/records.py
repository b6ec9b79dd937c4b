"""One training record, and one line's way to it: strict about keys, roles and contents. Knows no files, no tokens.

Three kinds: {"messages": [...]}, {"prompt": ..., "completion": ...}, {"text": ...}; and preference pairs,
{"prompt": ..., "chosen": ..., "rejected": ...}, all three text or all three lists of messages. A null key counts as
absent. Beside lists of messages there may be tools, as in OpenAI's files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Literal

from adapters_store.dialects.dialect import MAX_SCHEMA_DEPTH
from adapters_store.parsing.numbers import is_within
from adapters_store.parsing.strict_json import MAX_DEPTH, parse_strict_json
from trainer.data.problems import LineRefused, excerpt_of, excerpt_of_bytes
from trainer.data.tool_calls import Call, Tools, call_id, calls_of, tools_of

Kind = Literal["chat", "completion", "text"]
PAIR = ("chosen", "rejected")
MAX_MESSAGES = 4096
ROLES = ("system", "user", "assistant", "tool")
_OLD_TOOL_KEYS = {"functions": "tools", "function_call": "tool_calls"}
_BESIDE_MESSAGES = frozenset({"tools", "parallel_tool_calls"})
_KEYS: dict[frozenset[str], Kind] = {
    frozenset({"messages"}): "chat",
    frozenset({"prompt", "completion"}): "completion",
    frozenset({"text"}): "text",
}
_MESSAGE_KEYS = frozenset({"role", "content", "weight"})
_KEYS_OF_ROLE = {
    "assistant": _MESSAGE_KEYS | {"tool_calls", "reasoning_content"},
    "tool": _MESSAGE_KEYS | {"tool_call_id", "name"},
}
_MAX_TOOL_DEPTH = MAX_SCHEMA_DEPTH + MAX_DEPTH


@dataclass(frozen=True, slots=True)
class Message:
    """weight: what learning this message counts, 0 to 1; always 0 if the role is not the assistant's. calls, reasoning:
    an assistant's. call_id: of the call whose result a message of role tool brings; name: of its tool, if given."""

    role: str
    content: str
    weight: float
    calls: tuple[Call, ...] = ()
    reasoning: str = ""
    call_id: str = ""
    name: str = ""

    def rendered_from(self) -> dict[str, Any]:
        """What a chat template reads: as the server gives it."""
        fields = {"name": self.name, "tool_call_id": self.call_id, "reasoning_content": self.reasoning}
        given: dict[str, Any] = {name: value for name, value in fields.items() if value}
        calls = {"tool_calls": [call.for_template() for call in self.calls]} if self.calls else {}
        return {"role": self.role, "content": self.content, **given, **calls}


@dataclass(frozen=True, slots=True)
class Record:
    """One example as text. chat: `messages`, and the tools shown to it; completion: `prompt` and `completion`; text:
    `completion` alone. rejected: of a preference pair, the same with the worse answer."""

    kind: Kind
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    rejected: Record | None = None

    @property
    def is_pair(self) -> bool:
        return self.rejected is not None

    def digest(self) -> bytes:
        """16 bytes over the content, the same for two lines that differ in spacing or key order only."""
        content: list[object] = [self.kind, [_content_of(each) for each in self.messages], self.prompt, self.completion]
        if self.rejected is not None:
            content.append(self.rejected.digest().hex())
        body = json.dumps([*content, self.tools] if self.tools else content, ensure_ascii=False)
        return hashlib.blake2b(body.encode("utf-8"), digest_size=16).digest()


def _content_of(message: Message) -> list[object]:
    plain: list[object] = [message.role, message.content, message.weight]
    rendered = message.rendered_from()
    return plain if rendered.keys() == {"role", "content"} else [*plain, rendered]


def parse_record(line: bytes) -> Record:
    """The record of one line. Raises LineRefused with a code, a message and an excerpt."""
    body = parse_object(line)
    return _pair(body) if body.keys() >= {*PAIR} else _single(body)


def _pair(body: Mapping[str, object]) -> Record:
    """Raises LineRefused, also for two answers that are one."""
    given = _without_nulls(body)
    texts = [given.get(name) for name in ("prompt", *PAIR)]
    wanted = str if isinstance(texts[0], str) else list
    known = {"prompt", *PAIR, *(_BESIDE_MESSAGES if wanted is list else ())}
    if not given.keys() <= known:
        unknown = next(key for key in given if key not in known)
        message = f"unknown key {excerpt_of(unknown)}; known beside chosen and rejected: {', '.join(sorted(known))}"
        raise LineRefused("unknown_key", message, excerpt=excerpt_of(list(body)))
    if not all(isinstance(text, wanted) for text in texts):
        message = "prompt, chosen and rejected must be three texts, or three lists of messages"
        raise LineRefused("wrong_type", message, excerpt=excerpt_of(texts))
    chosen, rejected = (_side(given, name) for name in PAIR)
    if chosen.digest() == rejected.digest():
        raise LineRefused("nothing_supervised", "chosen and rejected are the same answer")
    return replace(chosen, rejected=rejected)


def _side(body: dict[str, Any], name: str) -> Record:
    """The prompt with one of its answers, of which nothing in the prompt is learned."""
    prompt, answer = body["prompt"], body[name]
    rest = {key: body[key] for key in body.keys() & _BESIDE_MESSAGES}
    single: dict[str, Any] = {"prompt": prompt, "completion": answer}
    if isinstance(prompt, list):
        single = {**rest, "messages": [*map(_unlearned, prompt), *answer]}
    try:
        record = _single(single)
    except LineRefused as error:
        raise LineRefused(error.code, f"{name}: {error.message}", excerpt=error.excerpt, param=error.param) from None
    if record.kind == "chat" and not any(message.weight for message in record.messages[len(prompt) :]):
        raise LineRefused("nothing_supervised", f"{name} holds no answer of the assistant's", param=name)
    return record


def _unlearned(message: object) -> object:
    is_answer = isinstance(message, dict) and message.get("role") == "assistant"
    return {**message, "weight": 0} if is_answer else message  # type: ignore[dict-item]


def _single(body: Mapping[str, Any]) -> Record:
    present = _without_nulls(body)
    if frozenset(present) in _KEYS:
        body = present
    elif "messages" in present and present.keys() <= {"messages", *_BESIDE_MESSAGES}:
        tools = tools_of(present)
        return Record("chat", messages=_messages(body["messages"], tools), tools=tools.definitions)
    kind = _KEYS.get(frozenset(body))
    if kind == "chat":
        return Record("chat", messages=_messages(body["messages"], Tools()))
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


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object in a line, whatever it means. Raises LineRefused."""

    def refused(code: str, message: str) -> LineRefused:
        return LineRefused(code, message, excerpt=excerpt_of_bytes(line))

    body = parse_strict_json(
        line,
        what="the line",
        max_objects=MAX_MESSAGES * 2,
        refused=refused,
        too_many="too_many_messages",
        max_depth=_MAX_TOOL_DEPTH if b'"tools"' in line else MAX_DEPTH,
    )
    if not isinstance(body, dict):
        raise LineRefused(
            "not_an_object", f"a line must be a JSON object, got {type(body).__name__}", excerpt=excerpt_of(body)
        )
    return body


def _wrong_keys(body: Mapping[str, object]) -> LineRefused:
    """Names the wrong key, compared with the kind that the line resembles most."""
    for key in body:
        if key in _OLD_TOOL_KEYS:
            return _old_tools(key, key)
    if not body:
        return LineRefused(
            "missing_key", 'the object is empty; "messages", "prompt" and "completion", or "text" needed'
        )
    nearest = max(_KEYS, key=lambda keys: len(keys & body.keys()))
    nearest = nearest | _BESIDE_MESSAGES if "messages" in nearest & body.keys() else nearest
    unknown = [key for key in body if key not in nearest]
    if unknown:
        known = " and ".join(sorted(nearest)) if nearest & body.keys() else "messages, prompt and completion, or text"
        return LineRefused(
            "unknown_key", f"unknown key {excerpt_of(unknown[0])}; known: {known}", excerpt=excerpt_of(list(body))
        )
    missing = min(nearest - body.keys() - _BESIDE_MESSAGES)
    return LineRefused("missing_key", f"{missing} is missing", param=missing)


def _old_tools(key: str, where: str) -> LineRefused:
    message = f"{where}: OpenAI's older form is not supported; write it as {_OLD_TOOL_KEYS[key]}"
    return LineRefused("unsupported_tools", message, param=where)


def _text(value: object, param: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise LineRefused(
            "wrong_type", f"{param} must be a string, got {_type_name(value)}", excerpt=excerpt_of(value), param=param
        )
    if not may_be_empty and not value.strip():
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


def _messages(value: object, tools: Tools) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise LineRefused("wrong_type", f"messages must be a list, got {_type_name(value)}", param="messages")
    if not value:
        raise LineRefused("no_assistant", "messages is empty", param="messages")
    messages = tuple(_message(item, f"messages[{index}]", tools) for index, item in enumerate(value))
    _check_order(messages)
    return messages


def _message(value: object, where: str, tools: Tools) -> Message:
    if not isinstance(value, dict):
        raise LineRefused("wrong_type", f"{where} must be an object, got {_type_name(value)}", param=where)
    given = _without_nulls(value)
    role = given.get("role")
    known = _KEYS_OF_ROLE.get(role, _MESSAGE_KEYS) if isinstance(role, str) else _MESSAGE_KEYS
    if not given.keys() <= known:
        raise _wrong_message_key(given, known, where)
    if role not in ROLES:
        raise _wrong_role(role, where)
    calls = calls_of(given["tool_calls"], f"{where}.tool_calls", tools) if "tool_calls" in given else ()
    if "content" not in value and not calls:
        raise LineRefused("missing_key", f"{where}.content is missing", param=f"{where}.content")
    content = _joined_parts(value.get("content"), f"{where}.content")
    return Message(
        str(role),
        ""
        if calls and content is None
        else _text(content, f"{where}.content", may_be_empty=bool(calls) or role == "tool"),
        _weight(given, where) if "weight" in given else float(role == "assistant"),
        calls=calls,
        reasoning=_text(given["reasoning_content"], f"{where}.reasoning_content")
        if "reasoning_content" in given
        else "",
        call_id=call_id(given.get("tool_call_id"), f"{where}.tool_call_id") if role == "tool" else "",
        name=_text(given["name"], f"{where}.name") if "name" in given else "",
    )


def _wrong_message_key(given: Mapping[str, object], known: Set[str], where: str) -> LineRefused:
    key = next(key for key in given if key not in known)
    if key in _OLD_TOOL_KEYS:
        return _old_tools(key, f"{where}.{key}")
    message = f"{where}: unknown key {excerpt_of(key)}; known: {', '.join(sorted(known))}"
    return LineRefused("unknown_key", message, param=where)


def _wrong_role(role: object, where: str) -> LineRefused:
    param = f"{where}.role"
    if role == "function":
        message = f"{param}: OpenAI's older form is not supported; write it as role tool with tool_call_id"
        return LineRefused("unsupported_tools", message, param=param)
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
    _check_results(messages)


def _check_results(messages: tuple[Message, ...]) -> None:
    """Each result answers a call of the assistant's message before it, and no call has two."""
    waiting: set[str] = set()
    for index, message in enumerate(messages):
        if message.role == "assistant":
            waiting = {call.id for call in message.calls}
        elif message.role == "tool" and message.call_id not in waiting:
            where = f"messages[{index}].tool_call_id"
            reason = f"no call before it waits for the result of {excerpt_of(message.call_id)}"
            raise LineRefused("bad_tool_call", f"{where}: {reason}", param=where)
        waiting.discard(message.call_id)


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__
