"""Messages as other tools write them, as this trainer reads them. Knows one conversation; knows no files.

Only what keeps the meaning is changed, each with a note; everything else stays as it is, and is checked where records
are parsed.
"""

from __future__ import annotations

from typing import Any

from trainer.data.problems import LineRefused, excerpt_of

Message = dict[str, Any]
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_WEIGHTS = ("loss_weight", "train", "training")  # LLaMA-Factory's and Axolotl's names of `weight`
_LEFT_OUT = ("name", "id", "timestamp", "date")


def from_turns(turns: Any, key: str) -> Any:
    """ShareGPT's turns (`from`, `value`) as messages. Raises LineRefused."""
    if not isinstance(turns, list):
        return turns
    return [_from_turn(turn, f"{key}[{index}]") for index, turn in enumerate(turns)]


def _from_turn(turn: Any, where: str) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    role = turn["from"]
    if role in ("function_call", "observation", "tool", "function"):
        message = f"{where}: {role} is not converted; write tool calls as `messages` with `tools`"
        raise LineRefused("unsupported_tools", message, param=where)
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {"role": role, "content": turn.get("value"), **rest}


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
