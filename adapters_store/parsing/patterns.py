"""Matches module paths the way PEFT does. A regular expression from outside runs in linear time (RE2), or not at all.

Knows names only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import re2

Value = TypeVar("Value")

# What a rank_pattern or alpha_pattern key may hold. PEFT runs the key as a regex; of these characters only "." and
# a leading "^" (both in PEFT's own documentation) mean more than themselves.
PLAIN_KEY = re.compile(r"\^?[A-Za-z0-9_.\-]+")
_INSIDE = r".*\."  # PEFT itself writes ".*\.gate_up_proj"
PATTERN_KEY = re.compile(rf"({re.escape(_INSIDE)})?[A-Za-z0-9_.\-]+|{PLAIN_KEY.pattern}")

MAX_PATTERN_CHARS = 4096
_MAX_PROGRAM_SIZE = 5000  # RE2's instructions: a match takes at most this times the name's length
_MAX_PATTERN_BYTES = 1 << 20  # of memory
_READ_OTHERWISE = ("{,", "[:", "\\z", "\\p", "\\P", "\\Q", "\\C")  # by Python and by RE2


class ModulePattern:
    """A regular expression that PEFT matches with the whole module path: `re.fullmatch(text, module)`.

    is_decided: False for what RE2 cannot run (look-around, back references), reads otherwise, or cannot hold.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._program = _compiled(text)

    @property
    def is_decided(self) -> bool:
        return self._program is not None

    def matches(self, module: str) -> bool | None:
        """None if it is not decided: then the tensors of the adapter say which modules PEFT matched."""
        return None if self._program is None else self._program.fullmatch(module) is not None


def _compiled(text: str) -> Any:
    """None: not decided."""
    if len(text) > MAX_PATTERN_CHARS or any(part in text for part in _READ_OTHERWISE):
        return None
    options = re2.Options()
    options.max_mem, options.log_errors = _MAX_PATTERN_BYTES, False
    try:
        program = re2.compile(text, options)
    except (re2.error, UnicodeEncodeError):
        return None
    return program if program.programsize <= _MAX_PROGRAM_SIZE else None


def suffixes_at_dots(name: str) -> Iterator[str]:
    """The name itself, then what follows each dot: "a.b.c" -> "a.b.c", "b.c", "c"."""
    yield name
    start = name.find(".")
    while start >= 0:
        yield name[start + 1 :]
        start = name.find(".", start + 1)


class SuffixPatterns(Generic[Value]):
    r"""An ordered mapping of PATTERN_KEY keys; equals `re.match(rf"(.*\.)?({key})$", name)`, first key wins.

    Source: peft.utils.other.get_pattern_key. A "." in a key matches any one character, as it does there.
    """

    def __init__(self, items: Iterable[tuple[str, Value]]) -> None:
        self._by_length: dict[int, list[tuple[int, str, bool | None, Value]]] = {}
        self._num_keys = 0
        for order, (key, value) in enumerate(items):
            text = key.removeprefix(_INSIDE).removeprefix("^")
            is_whole = None if text == key else key.startswith("^")
            self._by_length.setdefault(len(text), []).append((order, text, is_whole, value))
            self._num_keys += 1

    def __len__(self) -> int:
        return self._num_keys

    def find(self, name: str, default: Value) -> Value:
        """The value of the first key that matches `name`, else `default`."""
        if not self._num_keys:
            return default
        best_order, best = self._num_keys, default
        for suffix in suffixes_at_dots(name):
            for order, text, is_whole, value in self._by_length.get(len(suffix), ()):
                if order >= best_order:
                    break
                if is_whole in (None, len(suffix) == len(name)) and _matches(text, suffix):
                    best_order, best = order, value
                    break
        return best


def _matches(text: str, suffix: str) -> bool:
    if text == suffix:
        return True
    if text.count(".") <= suffix.count("."):
        return False  # a dot of the name that the key spells otherwise can never match
    return all(mine in (".", theirs) for mine, theirs in zip(text, suffix, strict=True))
