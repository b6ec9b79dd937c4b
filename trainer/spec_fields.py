"""Checks one field of a training spec and says what it may hold. Knows types and limits; knows no training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adapters_store.parsing.numbers import is_within
from adapters_store.parsing.patterns import PLAIN_KEY
from adapters_store.parsing.strict_json import shown

MAX_ENTRIES = 8192  # as the store allows in target_modules and in each pattern
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class SpecError(ValueError):
    """One field of a spec is not usable. `code` is "unknown_field", "missing_field", "bad_field" or "bad_spec";
    `param` is the field's dotted path, e.g. "adapter.rank"."""

    def __init__(self, field: str, value: object, limit: str, *, code: str = "bad_field") -> None:
        self.code = code
        self.param = field
        self.message = f"{field}: must be {limit}, got {shown(value)}"
        super().__init__(self.message)


def whole(field: str, value: object, low: int, high: int) -> int:
    """A whole number from low to high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SpecError(field, value, f"a whole number from {low} to {high}")
    return value


def number(field: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """A finite number from low (excluded with open_low) to high. YAML 1.1 reads "2e-4" as text: it is taken as well."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if not is_within(value, low, high, open_low=open_low):
        start = f"above {low:g}" if open_low else f"from {low:g}"
        raise SpecError(field, value, f"a number {start} to {high:g}")
    return float(value)  # type: ignore[arg-type]


def one_of(field: str, value: object, allowed: Iterable[str]) -> str:
    """One of the allowed words."""
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise SpecError(field, value, f"one of {', '.join(allowed)}")
    return value


def flag(field: str, value: object) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise SpecError(field, value, "true or false")
    return value


def path(field: str, value: object) -> Path:
    """A path that is not empty; whether it exists is asked when the run starts."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise SpecError(field, value, "a path")
    return Path(value).expanduser()


def modules(field: str, value: object) -> str | tuple[str, ...]:
    """ "all-linear", or the names (or dotted ends) of linear layers: a list, never a regular expression."""
    if value == "all-linear":
        return "all-linear"
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_ENTRIES:
        raise SpecError(field, value, f'"all-linear" or a list of 1 to {MAX_ENTRIES} module names')
    for name in value:
        if not isinstance(name, str) or PLAIN_KEY.fullmatch(name) is None or name.startswith("^"):
            raise SpecError(field, name, "a list of plain module names (letters, digits, . _ -)")
    return tuple(value)


def pattern(field: str, value: object, low: float, high: float, *, integral: bool) -> dict[str, Any]:
    """Module name (or its dotted end) -> number. Regular expressions are refused, as the store refuses them."""
    if not isinstance(value, Mapping) or len(value) > MAX_ENTRIES:
        raise SpecError(field, value, f"an object of at most {MAX_ENTRIES} module names")
    checked: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str) or PLAIN_KEY.fullmatch(key) is None:
            raise SpecError(field, key, "an object whose keys are plain module names")
        where = f"{field}.{key}"
        checked[key] = whole(where, item, int(low), int(high)) if integral else number(where, item, low, high)
    return checked
