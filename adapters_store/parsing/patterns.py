"""Matches module paths the way PEFT does, without running anyone's regular expression. Knows names only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")

# What a rank_pattern or alpha_pattern key may hold. PEFT runs the key as a regex; of these characters only "." and
# a leading "^" (both in PEFT's own documentation) mean more than themselves.
PLAIN_KEY = re.compile(r"\^?[A-Za-z0-9_.\-]+")


def suffixes_at_dots(name: str) -> Iterator[str]:
    """The name itself, then what follows each dot: "a.b.c" -> "a.b.c", "b.c", "c"."""
    yield name
    start = name.find(".")
    while start >= 0:
        yield name[start + 1 :]
        start = name.find(".", start + 1)


class SuffixPatterns(Generic[Value]):
    r"""An ordered mapping of PLAIN_KEY keys; equals `re.match(rf"(.*\.)?({key})$", name)`, first key wins.

    Source: peft.utils.other.get_pattern_key. A "." in a key matches any one character, as it does there.
    """

    def __init__(self, items: Iterable[tuple[str, Value]]) -> None:
        self._by_length: dict[int, list[tuple[int, str, bool, Value]]] = {}
        self._num_keys = 0
        for order, (key, value) in enumerate(items):
            anchored = key.startswith("^")
            text = key[1:] if anchored else key
            self._by_length.setdefault(len(text), []).append((order, text, anchored, value))
            self._num_keys += 1

    def __len__(self) -> int:
        return self._num_keys

    def find(self, name: str, default: Value) -> Value:
        """The value of the first key that matches `name`, else `default`."""
        if not self._num_keys:
            return default
        best_order, best = self._num_keys, default
        for suffix in suffixes_at_dots(name):
            for order, text, anchored, value in self._by_length.get(len(suffix), ()):
                if order >= best_order:
                    break
                if not (anchored and len(suffix) != len(name)) and _matches(text, suffix):
                    best_order, best = order, value
                    break
        return best


def _matches(text: str, suffix: str) -> bool:
    if text == suffix:
        return True
    if text.count(".") <= suffix.count("."):
        return False  # a dot of the name that the key spells otherwise can never match
    return all(mine in (".", theirs) for mine, theirs in zip(text, suffix, strict=True))
