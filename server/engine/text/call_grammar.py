"""The grammar of an answer that may reason, write text and call tools: a Lark text for llguidance. Knows no state.

Free text ends at the dialect's trigger and nowhere else. If the tokenizer has a token for a marker, only that token is
the marker, and the same characters in ordinary tokens are text. Syntax: docs/syntax.md of llguidance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from adapters_store.dialects.dialect import Dialect, Marker, Maybe, Part, Tool
from adapters_store.dialects.parameters import arguments_schema
from adapters_store.dialects.reasoning import ReasoningMarks

Choice = Literal["none", "auto", "required"]

_ARGUMENTS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_TEXT = "/(?s:.*)/"
ANSWER = r"/\n{0,2}/ @answer"  # another grammar, see `GrammarSpec.before`; models end their reasoning with a blank line


@dataclass(frozen=True, kw_only=True)
class ReasoningPart:
    """is_open: the prompt opened the reasoning already. budget: its most tokens; None: no bound. shut_ids: the tokens
    that reasoning with a budget may not hold, the closing marker's among them."""

    marks: ReasoningMarks
    is_open: bool
    budget: int | None = None
    shut_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CallsPart:
    """choice "required": the answer is calls and nothing else. is_parallel: more than one is allowed."""

    dialect: Dialect
    tools: Sequence[Tool]
    choice: Choice
    is_parallel: bool = True


def answer_grammar(
    marker_ids: Mapping[str, int],
    *,
    reasoning: ReasoningPart | None = None,
    calls: CallsPart | None = None,
    text: str = "TEXT",
) -> str:
    """The Lark text. marker_ids: the token of each marker that the tokenizer has a token for. text: an answer without
    calls, free or `ANSWER`."""
    writer = _Writer(marker_ids)
    body = text if calls is None else writer.answer(calls)
    start = body if reasoning is None else f"{writer.reasoning(reasoning)} ({body})"
    return "\n".join(["%llguidance {}", f"start: {start}", *writer.rules, f"TEXT: {writer.text}", ""])


class _Writer:
    """Collects rules. text: the pattern of free text."""

    def __init__(self, marker_ids: Mapping[str, int]) -> None:
        self._marker_ids = marker_ids
        self.rules: list[str] = []
        self.text = _ANY_TEXT

    def reasoning(self, part: ReasoningPart) -> str:
        close = self._part(Marker(part.marks.close))
        if part.budget == 0:
            self.rules.append(f"thinking: {close}")
        elif part.budget is not None:
            self.rules.append(f"thinking: <[^{_ranges(part.shut_ids)}]>{{0,{part.budget}}} {close}")
        elif part.marks.close in self._marker_ids:
            self.rules.append(f"thinking: TEXT {close}")
        else:
            self.rules.append(f"thinking[lazy]: {_ANY_TEXT} {close}")
        return "thinking" if part.is_open else f"({self._part(Marker(part.marks.open))} thinking)?"

    def answer(self, part: CallsPart) -> str:
        if part.choice == "none":
            return self._text_without_calls(part.dialect)
        dialect = part.dialect
        self.rules += self._call_rules(part)
        more = ""
        if part.is_parallel and dialect.between is not None:
            more = f" ({self._parts(dialect.between)} call)*"
        tail = f"call{more} {self._parts(dialect.end)}"
        if part.choice == "required":
            return f"{self._parts(dialect.begin)} {tail}"
        head = self._text_and_trigger(dialect)
        return f"{self._text_without_calls(dialect)} | {head} {self._parts(dialect.begin[1:])} {tail}"

    def _text_without_calls(self, dialect: Dialect) -> str:
        trigger = dialect.trigger
        if isinstance(trigger, Marker) and trigger.name in self._marker_ids:
            return "TEXT"
        pattern = re.escape(_name_of(trigger)).replace("/", r"\/")
        anything = "(?s:.*)" if isinstance(trigger, Marker) else r"\s*"
        self.rules.append(f"ANSWER: {_ANY_TEXT} & ~/{anything}{pattern}(?s:.*)/")
        return "ANSWER"

    def _text_and_trigger(self, dialect: Dialect) -> str:
        """What precedes the rest of the first call; a call that opens the answer may follow blanks."""
        trigger = dialect.trigger
        if not isinstance(trigger, Marker):
            return r"/\s{0,4}/"
        if trigger.name in self._marker_ids:
            return f"TEXT {self._part(trigger)}"
        self.rules.append(f"head[lazy]: {_ANY_TEXT} {_quoted(trigger.name)}")
        return "head"

    def _call_rules(self, part: CallsPart) -> list[str]:
        opening, middle, closing = map(self._parts, (part.dialect.opening, part.dialect.middle, part.dialect.closing))
        rules = [f"call: {opening} ({' | '.join(f'call_{number}' for number in range(len(part.tools)))}) {closing}"]
        for number, tool in enumerate(part.tools):
            schema = json.dumps({**arguments_schema(tool["function"]), "x-guidance": _ARGUMENTS})
            rules.append(f"call_{number}: {_quoted(tool['function']['name'])} {middle} %json {schema}")
        return rules

    def _parts(self, parts: Sequence[Part]) -> str:
        return " ".join(map(self._part, parts))

    def _part(self, part: Part) -> str:
        if isinstance(part, Maybe):
            return f"{_quoted(part.text)}?"
        if isinstance(part, Marker) and part.name in self._marker_ids:
            return f"<[{self._marker_ids[part.name]}]>"
        return _quoted(_name_of(part))


def _name_of(part: Marker | str) -> str:
    return part.name if isinstance(part, Marker) else part


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _ranges(ids: Sequence[int]) -> str:
    """ "1-3,7": the ids as few ranges."""
    ranges: list[list[int]] = []
    for id_ in sorted(set(ids)):
        if ranges and id_ == ranges[-1][1] + 1:
            ranges[-1][1] = id_
        else:
            ranges.append([id_, id_])
    return ",".join(f"{low}-{high}" if low < high else str(low) for low, high in ranges)
