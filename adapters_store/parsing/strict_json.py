"""JSON from outside: bytes to a value with one meaning only. Knows no schema.

Python's parser takes duplicate keys (last wins), NaN and any depth; safetensors and PEFT read the same bytes with
other parsers. What two readers could read differently is refused here.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import NoReturn

from adapters_store.errors import InputRefused
from adapters_store.parsing.json_pieces import JsonRules, TooDeep, read_json

Refused = Callable[[str, str], InputRefused]  # code and message -> the error to raise

MAX_DEPTH = 8
_WHOLE_CHARS = 1 << 20  # read in one go: each object in it calls a hook, during which other threads run
_WHOLE_LISTS = 1 << 15  # for a list no hook is called, so a text with more of them is read in pieces


def parse_strict_json(
    data: bytes,
    *,
    what: str,
    max_objects: int,
    refused: Refused,
    too_many: str = "too_many_objects",
    max_depth: int = MAX_DEPTH,
) -> object:
    """Parse `data`; `what` names the document in errors, `too_many` is the code for more than max_objects objects.

    Raises refused(code, message): not_utf8, bad_json, duplicate_key, nan_literal, too_deep, or the code `too_many`.
    """
    reader = _Reader(what, max_objects, refused, too_many)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refused("not_utf8", f"{what}: byte {error.start} is not UTF-8") from None
    rules = JsonRules(
        pairs=reader.pairs,
        constant=reader.constant,
        integer=reader.integer if "-0" in text else int,
        whole_chars=_WHOLE_CHARS if text.count("[") <= _WHOLE_LISTS else 0,
        max_depth=max_depth,
    )
    try:
        value: object = read_json(text, rules)
    except (TooDeep, RecursionError):
        raise refused("too_deep", f"{what}: nested deeper than {max_depth}") from None
    except ValueError as error:
        raise refused("bad_json", f"{what}: not JSON: {shown(str(error), 120)}") from None
    if text.count("[") + text.count("{") > max_depth:
        _check_depth(value, what, refused, max_depth)
    return value


def shown(value: object, limit: int = 80) -> str:
    """`value` for an error message: short, ASCII and without control characters, whatever the client sent."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = limit
    short.maxlevel = 2
    return short.repr(value).encode("ascii", "backslashreplace").decode()[: limit + 20]


def members(value: object) -> list[object]:
    """What a JSON object or list holds; of any other value nothing."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


class _Reader:
    """The parser's hooks. An error raised in a hook leaves the parser at once, so the work done stays bounded."""

    def __init__(self, what: str, max_objects: int, refused: Refused, too_many: str) -> None:
        self.what = what
        self.refused = refused
        self.too_many = too_many
        self.max_objects = max_objects
        self.num_objects = 0

    def pairs(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        self.num_objects += 1
        if self.num_objects > self.max_objects:
            message = f"{self.what}: more than {self.max_objects} objects"
            raise self.refused(self.too_many, message)
        body = dict(pairs)
        if len(body) != len(pairs):
            self._refuse_duplicate([key for key, _ in pairs])
        return body

    def _refuse_duplicate(self, keys: list[str]) -> NoReturn:
        seen: set[str] = set()
        duplicate = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise self.refused("duplicate_key", f"{self.what}: duplicate key {shown(duplicate)}")

    def constant(self, literal: str) -> NoReturn:
        raise self.refused("nan_literal", f"{self.what}: {literal} is not JSON")

    def integer(self, digits: str) -> int | float:
        # Rust reads "-0" as a float and Python as the integer 0: keep it a float here too, so no size is ever "-0".
        return int(digits) if digits != "-0" else -0.0


def _check_depth(value: object, what: str, refused: Refused, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        level = [child for item in level for child in members(item) if isinstance(child, (dict, list))]
        if not level:
            return
    raise refused("too_deep", f"{what}: nested deeper than {max_depth}")
