"""What a tool dialect is: how a model writes its calls, and how tools and results are shown to it. Knows no tokenizer.

A call's form is fixed parts around a name and a JSON object of arguments. Grammar, reader and rendering are all made
from these parts, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters_store.parsing.strict_json import members

Tool = Mapping[str, Any]  # OpenAI's: {"type": "function", "function": {"name", "description", "parameters"}}
MAX_CALL_ID_CHARS, PLAIN_ID_CHARS = 64, 24
MAX_TOOLS, MAX_CALLS = 128, 128
MAX_TOOLS_CHARS = 48 * 1024  # of all definitions, as JSON: they are compiled to one grammar
MAX_SCHEMA_DEPTH = 32
MAX_DESCRIPTION_CHARS = 8192
TOOL_NAME = r"^[a-zA-Z0-9_-]{1,64}$"


@dataclass(frozen=True, slots=True)
class Marker:
    """A token of this name if the tokenizer has one, else the name as text."""

    name: str


@dataclass(frozen=True, slots=True)
class Maybe:
    """A text that may be left out: models differ in it."""

    text: str


Part = str | Marker | Maybe


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """A group of calls is `begin`, calls with `between` among them, `end`; a call is `opening`, its name, `middle`, its
    arguments, `closing`.

    begin: a marker or nothing first. Nothing: a call must open the answer. between: None if an answer has one call at
    most. template_words: texts that a chat template of this dialect holds, and foreign_words: those that it does not.
    instructions: shown before the tools, where the chat template itself shows none; its "{form}" is a call's form.
    in_first_user_turn: show them there, and not in a system turn. result: how a call's result is shown, as the turn of
    result_role. call_id_chars: of an id that the chat template accepts.
    """

    name: str
    begin: tuple[Part, ...] = ()
    opening: tuple[Part, ...] = ('{"name": "',)
    middle: tuple[Part, ...] = ('", "arguments": ',)
    closing: tuple[Part, ...] = ("}",)
    between: tuple[Part, ...] | None = None
    end: tuple[Part, ...] = ()
    template_words: tuple[str, ...] = ()
    foreign_words: tuple[str, ...] = ()
    instructions: str = "You may call these tools. To call one, answer with {form} and nothing else. Tools:"
    in_first_user_turn: bool = False
    result_role: str = "user"
    result: str = "Result of {name}: {content}"
    call_id_chars: int = PLAIN_ID_CHARS

    @property
    def trigger(self) -> Marker | str:
        """What a call begins with: a marker, which free text does not hold, or a text, with which it does not begin."""
        first = (*self.begin, *self.opening)[0]
        assert not isinstance(first, Maybe), f"{self.name}: a call must begin with a fixed part"
        return first

    @property
    def markers(self) -> tuple[str, ...]:
        """The names of all markers, each once."""
        parts = (*self.begin, *self.opening, *self.middle, *self.closing, *(self.between or ()), *self.end)
        return tuple(dict.fromkeys(part.name for part in parts if isinstance(part, Marker)))

    def written(self, calls: Sequence[tuple[str, str]]) -> str:
        """These calls, each a name and the JSON text of its arguments, as the model would write them."""
        texts = [text_of((*self.opening, name, *self.middle, arguments, *self.closing)) for name, arguments in calls]
        return f"{text_of(self.begin)}{text_of(self.between or ()).join(texts)}{text_of(self.end)}"

    def is_dialect_of(self, template: str) -> bool:
        """Whether a chat template shows tools and calls in this dialect."""
        has = [word in template for word in self.template_words]
        return bool(has) and all(has) and not any(word in template for word in self.foreign_words)


def is_deeper(value: Any, limit: int) -> bool:
    """Whether a JSON value is nested deeper than that many levels."""
    level = [value]
    for _ in range(limit):
        level = [member for each in level for member in members(each)]
    return bool(level)


def text_of(parts: Sequence[Part]) -> str:
    """The parts as text: markers by their names, and nothing that may be left out."""
    return "".join(part.name if isinstance(part, Marker) else part for part in parts if not isinstance(part, Maybe))
