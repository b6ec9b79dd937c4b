"""What a record means: the shapes that people bring, as messages, prompt and completion, or text. Knows no files.

    as_example(body, columns) -> Example(shape, body, notes)

A key that says nothing about the text (an id, a source) is left out with a note. What would change the meaning is
refused: answers with a label, images, columns that no shape explains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.data.formats.messages import cleaned, from_json, from_turns, tools_from
from trainer.data.problems import LineRefused, excerpt_of
from trainer.data.records import PAIR

Body = dict[str, Any]
ROLES = ("system", "context", "user", "assistant")  # what --map assigns columns to
_CHAT_KEYS = frozenset({"messages", "tools", "functions", "parallel_tool_calls"})
_VERDICTS = {"prompt", "completion", "label"}  # KTO's
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


PAIRS = "preference pairs"  # how the name of each of their shapes begins


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
    if body.keys() >= _VERDICTS:
        message = "answers with a label (KTO) are not trained here; pairs of chosen and rejected answers are"
        raise LineRefused("preference_data", message, excerpt=excerpt_of(list(body)))
    for recognise in (_openai_pair, _pair, _chat, _turns, _conversational, _plain, _columns):
        example = recognise(body)
        if example is not None:
            return example
    raise _unknown(body)


def _unknown(body: Body) -> LineRefused:
    message = (
        f"no format is recognised in the keys {excerpt_of(list(body))}; name columns: --map user=...,assistant=..."
    )
    return LineRefused("unknown_format", message, excerpt=excerpt_of(list(body)))


def _openai_pair(body: Body) -> Example | None:
    """OpenAI's: the chat under `input`, two answers beside it."""
    names = ("preferred_output", "non_preferred_output")
    if not body.keys() >= {*names, "input"}:
        return None
    asked = body["input"]
    if not isinstance(asked, dict) or not asked.keys() >= {"messages"}:
        raise LineRefused("wrong_type", "input must be an object with messages", excerpt=excerpt_of(asked))
    example = Example(f"{PAIRS} (OpenAI)", {key: asked[key] for key in asked if key in _CHAT_KEYS})
    example.body["prompt"] = cleaned(example.body.pop("messages"), example.notes, keep_tail=True)
    for name, key in zip(names, PAIR, strict=True):
        example.body[key] = cleaned(body[name], example.notes)
    return _left_out(example, body, {*names, "input"})


def _pair(body: Body) -> Example | None:
    """TRL's: chosen and rejected beside a prompt, or both with the prompt in them; LLaMA-Factory's and Alpaca's too."""
    if not body.keys() >= set(PAIR):
        return None
    example = Example(PAIRS, {})
    answers = [_answer(body[key], example.notes) for key in PAIR]
    prompt, known = _prompt_of(body, example.notes)
    if prompt is None or all(isinstance(each, list) and each and each[0]["role"] != "assistant" for each in answers):
        prompt, answers = _common_start(answers)
    if isinstance(prompt, str) and isinstance(answers[0], list):
        prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and isinstance(answers[0], str):
        answers = [[{"role": "assistant", "content": text}] for text in answers]
    example.body |= {"prompt": prompt, **dict(zip(PAIR, answers, strict=True))}
    example.body |= {key: body[key] for key in ("parallel_tool_calls",) if key in body} | _tools_of(body)
    return _left_out(example, body, {*known, *PAIR, "tools", "parallel_tool_calls"})


def _answer(value: Any, notes: list[str]) -> Any:
    """Text, or messages; LLaMA-Factory's answer is one turn."""
    value = _parsed(value)
    turns = [value] if isinstance(value, dict) else value
    return cleaned(from_turns(turns, "answer"), notes) if isinstance(turns, list) else turns


def _prompt_of(body: Body, notes: list[str]) -> tuple[Any, set[str]]:
    """(the prompt or None, the keys that hold it)."""
    key = next((key for key in ("prompt", "conversations", "messages") if key in body), None)
    if key is not None:
        prompt = _parsed(body[key])
        if not isinstance(prompt, list):
            return prompt, {key}
        example = Example("", {"messages": cleaned(from_turns(prompt, key), notes, keep_tail=True)})
        _prepend_system(example, body.get("system"))
        return example.body["messages"], {key, "system"}
    user = next((key for key in ("instruction", "question", "query") if key in body), None)
    if user is None:
        return None, set()
    content = "\n\n".join(filter(None, (_cell(body, user), _cell(body, "input"))))
    turns = [*_history(body.get("history")), {"role": "user", "content": content}]
    system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
    return [*system, *turns], {user, "input", "history", "system"}


def _common_start(answers: list[Any]) -> tuple[Any, list[Any]]:
    """The messages that both answers begin with. Raises LineRefused for texts: where theirs part is no one's prompt."""
    if not all(isinstance(answer, list) for answer in answers):
        raise LineRefused("missing_key", "chosen and rejected need a prompt beside them", param="prompt")
    same = 0
    for one, other in zip(*answers, strict=False):
        if one != other:
            break
        same += 1
    return answers[0][:same], [answer[same:] for answer in answers]


def _chat(body: Body) -> Example | None:
    if "messages" not in body:
        return None
    kept = {key: body[key] for key in body if key in _CHAT_KEYS - {"tools"}}
    example = Example("messages", kept | _tools_of(body))
    example.body["messages"] = cleaned(_parsed(body["messages"]), example.notes)
    _prepend_system(example, body.get("system"))
    return _left_out(example, body, {*_CHAT_KEYS, "system"})


def _tools_of(body: Body) -> Body:
    tools = tools_from(body.get("tools"))
    return {"tools": tools} if tools else {}


def _turns(body: Body) -> Example | None:
    """ShareGPT: `from` and `value`; some files have roles and contents under the same key."""
    key = next((key for key in ("conversations", "conversation") if key in body), None)
    if key is None:
        return None
    example = Example("ShareGPT", _tools_of(body))
    example.body["messages"] = cleaned(from_turns(_parsed(body[key]), key), example.notes)
    _prepend_system(example, body.get("system"))
    return _left_out(example, body, {key, "tools", "system"})


def _conversational(body: Body) -> Example | None:
    """TRL's prompt and completion as lists of messages; the prompt is not learned."""
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
    pairs, turns = value or [], list[Body]()
    if not isinstance(pairs, list):
        raise LineRefused("wrong_type", "history must be a list of [question, answer]", excerpt=excerpt_of(value))
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise LineRefused("wrong_type", "history must be a list of [question, answer]", excerpt=excerpt_of(pair))
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _parsed(value: Any) -> Any:
    """Tables hold a list as its JSON text."""
    found = from_json(value)
    return found if isinstance(found, list) else value


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
