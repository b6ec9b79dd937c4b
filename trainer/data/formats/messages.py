"""Messages as other tools write them, as this trainer reads them. Knows one conversation; knows no files.

Only what keeps the meaning is changed, each with a note; everything else stays as it is, and is checked where records
are parsed.
"""

from __future__ import annotations

import json
from typing import Any

from adapters_store.dialects.dialect import MAX_SCHEMA_DEPTH
from adapters_store.parsing.strict_json import MAX_DEPTH, parse_strict_json
from trainer.data.problems import LineRefused, excerpt_of

Message = dict[str, Any]
_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
}
_RESULTS = ("observation", "tool")
_WEIGHTS = ("loss_weight", "train", "training")  # LLaMA-Factory's and Axolotl's names of `weight`
_MAX_OBJECTS = 8192
_LEFT_OUT = ("name", "id", "timestamp", "date")


def from_turns(turns: Any, key: str) -> Any:
    """ShareGPT's turns (`from`, `value`) as messages, function calls as tool calls. Raises LineRefused."""
    if not isinstance(turns, list):
        return turns
    messages: list[Any] = []
    waiting: list[str] = []  # the calls whose results have not come
    for index, turn in enumerate(turns):
        where = f"{key}[{index}]"
        if isinstance(turn, dict) and turn.get("from") == "function_call":
            calls = _calls(turn.get("value"), where, index)
            waiting = [call["id"] for call in calls]
            messages.append({"role": "assistant", "content": None, "tool_calls": calls})
        elif isinstance(turn, dict) and turn.get("from") in _RESULTS:
            if len(waiting) != 1:
                message = f"{where}: one result for {len(waiting)} calls; write them as `messages` with `tools`"
                raise LineRefused("unsupported_tools", message, param=where)
            messages.append({"role": "tool", "tool_call_id": waiting.pop(), "content": turn.get("value")})
        else:
            messages.append(_from_turn(turn))
    return messages


def _from_turn(turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {"role": turn["from"], "content": turn.get("value"), **rest}


def _calls(value: Any, where: str, index: int) -> list[Message]:
    """One call or a list of calls, each a name and its arguments, as an object or as its JSON text."""
    found = from_json(value)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and call.keys() == {"name", "arguments"} for call in calls):
        message = f"{where}: a function_call must be JSON with name and arguments"
        raise LineRefused("bad_tool_call", message, excerpt=excerpt_of(value), param=where)
    return [
        {
            "id": f"call-{index}-{number}",
            "type": "function",
            "function": {**call, "arguments": _text(call["arguments"])},
        }
        for number, call in enumerate(calls)
    ]


def tools_from(value: Any) -> Any:
    """A list of tools, or its JSON text; a bare function becomes a tool. What else it is stays as it is."""
    found = from_json(value)
    if not isinstance(found, list):
        return found
    return [{"type": "function", "function": each} if _is_function(each) else each for each in found]


def _is_function(value: Any) -> bool:
    return isinstance(value, dict) and "name" in value and "function" not in value


def from_json(value: Any) -> Any:
    """What a JSON text of a list or an object holds; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    data = value.encode(errors="surrogatepass")
    try:
        return parse_strict_json(
            data, what="text", max_objects=_MAX_OBJECTS, refused=LineRefused, max_depth=MAX_SCHEMA_DEPTH + MAX_DEPTH
        )
    except LineRefused:
        return value


def _text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def cleaned(messages: Any, notes: list[str], *, keep_tail: bool = False) -> Any:
    """The messages, with roles and weights in our words. keep_tail: messages behind the last answer stay.

    Raises LineRefused for an object that is no message.
    """
    if not isinstance(messages, list):
        raise LineRefused("wrong_type", f"messages must be a list, got {type(messages).__name__}", param="messages")
    kept = [_message(each, f"messages[{index}]", notes) for index, each in enumerate(messages)]
    if kept and kept[0]["role"] == "system" and kept[0].get("content") in ("", []):
        notes.append("empty system message left out")
        kept = kept[1:]
    answers = [index for index, message in enumerate(kept) if message["role"] == "assistant"]
    if not keep_tail and answers and all(message["role"] == "user" for message in kept[answers[-1] + 1 :]):
        if len(kept) > answers[-1] + 1:
            notes.append("messages behind the last answer left out")
        kept = kept[: answers[-1] + 1]
    return kept


def _message(value: Any, where: str, notes: list[str]) -> Message:
    if not isinstance(value, dict) or "role" not in value:
        raise LineRefused(
            "wrong_type", f"{where} must be an object with a role", excerpt=excerpt_of(value), param=where
        )
    message = {key: item for key, item in value.items() if item is not None or key == "content"}
    role = message["role"]
    if role == "developer":
        notes.append("role developer read as system")
        message["role"] = "system"
    elif isinstance(role, str):
        message["role"] = _ROLES.get(role, role)
    for name in _LEFT_OUT:
        if name in message and message["role"] != "tool":
            notes.append(f"{name} of a message left out")
            del message[name]
    _rename_weight(message, notes)
    if isinstance(message.get("content"), list):
        message["content"] = [_part(part) for part in message["content"]]
    return message


def _rename_weight(message: Message, notes: list[str]) -> None:
    for name in _WEIGHTS:
        if name in message and "weight" not in message:
            weight = message.pop(name)
            if message["role"] == "assistant":
                notes.append(f"{name} read as weight")
                message["weight"] = float(weight) if isinstance(weight, bool) else weight
    if message["role"] != "assistant" and message.get("weight") in (0, 0.0):
        del message["weight"]  # nothing but answers is learned


def _part(part: Any) -> Any:
    """LLaMA-Factory's text parts have a `value`."""
    if isinstance(part, dict) and part.get("type") == "text" and part.keys() == {"type", "value"}:
        return {"type": "text", "text": part["value"]}
    return part
