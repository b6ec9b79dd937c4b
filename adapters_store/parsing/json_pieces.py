"""Reads JSON from outside in pieces, and no more values than a budget allows. Knows no schema.

Python's own reader holds the interpreter's lock from the first byte to the last: 8 MiB of `[],[],...` stop every other
thread for seconds. So only short texts go to it whole. Of a long one it reads single strings and runs of numbers; what
is between them is read here, and other threads can run at every step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from json import JSONDecodeError
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_RUN = re.compile(r"(?:(?>0|-?[1-9][0-9]{0,18}+)[ \t\n\r]*+,[ \t\n\r]*+){1,4096}+")
_WORDS: dict[str, Any] = {"null": None, "true": True, "false": False}
_CONSTANTS = ("NaN", "Infinity", "-Infinity")
_VALUE_COST = 4  # what any other value takes in time and memory, next to a whole number in a list
_CONTAINER_COST = 32

Pairs = list[tuple[str, Any]]


class TooManyValues(ValueError):
    """The text holds more values than its budget allows."""


class TooDeep(ValueError):
    """The text nests deeper than it may."""


@dataclass(frozen=True, kw_only=True)
class JsonRules:
    """How values are made. pairs: an object of its members. constant: NaN and infinities. integer: of its digits.

    whole_chars: texts up to here are read in one go. max_numbers: the budget, in whole numbers of a list; a list or
    object counts as 32 of them, any other value and any key as 4. max_depth: of a text that is read in pieces.
    """

    pairs: Callable[[Pairs], Any]
    constant: Callable[[str], Any]
    integer: Callable[[str], Any] = int
    whole_chars: int = 8192
    max_numbers: int = 2**20
    max_depth: int = 16


def read_json(text: str, rules: JsonRules) -> Any:
    """The value of one JSON text. Raises JSONDecodeError, TooManyValues, TooDeep, what the rules raise, and ValueError
    for an integer of more digits than Python reads; RecursionError for a short text that nests deep."""
    if len(text) > rules.whole_chars:
        return _Reader(text, rules).read()
    return json.loads(text, object_pairs_hook=rules.pairs, parse_constant=rules.constant, parse_int=rules.integer)


class _Reader:
    """One text, left to right. Every method takes a position and returns a value and the position behind it."""

    def __init__(self, text: str, rules: JsonRules) -> None:
        self._text = text
        self._rules = rules
        self._budget = rules.max_numbers
        self._depth = 0
        self._keys: dict[str, str] = {}

    def read(self) -> Any:
        if self._text.startswith("\ufeff"):
            raise JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", self._text, 0)
        value, end = self._value(self._skip(0))
        end = self._skip(end)
        if end != len(self._text):
            raise JSONDecodeError("Extra data", self._text, end)
        return value

    def _value(self, at: int) -> tuple[Any, int]:
        mark = self._text[at : at + 1]
        if mark == '"':
            return self._string(at)
        if mark == "[":
            return self._nested(self._list, at)
        if mark == "{":
            return self._nested(self._object, at)
        self._spend(_VALUE_COST)
        return self._scalar(at)

    def _scalar(self, at: int) -> tuple[Any, int]:
        text, rules = self._text, self._rules
        match = _NUMBER.match(text, at)
        if match is not None:
            whole, fraction, exponent = match.groups()
            return (float(match[0]) if fraction or exponent else rules.integer(whole)), match.end()
        for word, value in _WORDS.items():
            if text.startswith(word, at):
                return value, at + len(word)
        for word in _CONSTANTS:
            if text.startswith(word, at):
                return rules.constant(word), at + len(word)
        raise JSONDecodeError("Expecting value", text, at)

    def _string(self, at: int) -> tuple[str, int]:
        self._spend(_VALUE_COST)
        value, end = scanstring(self._text, at + 1, True)
        return value, end

    def _nested(self, read: Callable[[int], tuple[Any, int]], at: int) -> tuple[Any, int]:
        self._spend(_CONTAINER_COST)
        self._depth += 1
        if self._depth > self._rules.max_depth:
            raise TooDeep(f"nested deeper than {self._rules.max_depth} levels")
        result = read(self._skip(at + 1))
        self._depth -= 1
        return result

    def _list(self, at: int) -> tuple[list[Any], int]:
        values: list[Any] = []
        if self._text.startswith("]", at):
            return values, at + 1
        while True:
            run = _RUN.match(self._text, at)
            if run is not None:
                values += self._numbers(run[0])
                at = run.end()
            value, at = self._value(at)
            values.append(value)
            at, is_last = self._next(at, "]")
            if is_last:
                return values, at

    def _numbers(self, run: str) -> list[int]:
        """Of a run of whole numbers, each with its comma."""
        numbers: list[int] = json.loads("[" + run.rstrip(" \t\n\r")[:-1] + "]")
        self._spend(len(numbers))
        return numbers

    def _object(self, at: int) -> tuple[Any, int]:
        pairs: Pairs = []
        if self._text.startswith("}", at):
            return self._rules.pairs(pairs), at + 1
        while True:
            if not self._text.startswith('"', at):
                raise JSONDecodeError("Expecting property name enclosed in double quotes", self._text, at)
            key, at = self._string(at)
            at = self._skip(at)
            if not self._text.startswith(":", at):
                raise JSONDecodeError("Expecting ':' delimiter", self._text, at)
            value, at = self._value(self._skip(at + 1))
            pairs.append((self._keys.setdefault(key, key), value))
            at, is_last = self._next(at, "}")
            if is_last:
                return self._rules.pairs(pairs), at

    def _next(self, at: int, closing: str) -> tuple[int, bool]:
        """Behind a member: the next one's place, or behind the closing mark."""
        at = self._skip(at)
        if self._text.startswith(closing, at):
            return at + 1, True
        if not self._text.startswith(",", at):
            raise JSONDecodeError("Expecting ',' delimiter", self._text, at)
        return self._skip(at + 1), False

    def _skip(self, at: int) -> int:
        match = _SPACE.match(self._text, at)
        assert match is not None
        return match.end()

    def _spend(self, amount: int) -> None:
        self._budget -= amount
        if self._budget < 0:
            most = self._rules.max_numbers
            values, containers = most // _VALUE_COST, most // _CONTAINER_COST
            raise TooManyValues(
                f"too many values: at most {most} whole numbers, or {containers} lists and objects, or {values} others"
            )
