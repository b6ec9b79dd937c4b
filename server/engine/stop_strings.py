"""Finds the first stop string in text that arrives in parts, and what of the text may not be shown yet.

The first match is the one whose last character comes first (of several, the longest), so the result depends on the
text alone and never on how tokens cut it. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """`stop` ends at `end` characters into the part it was found in (and may have begun in an earlier part)."""

    stop: str
    end: int


class StopMatcher:
    """Knuth-Morris-Pratt over one text, for each stop string: time is linear in the text whatever the strings are.

    num_open: how many of the last characters fed are the beginning of a stop string.
    """

    __slots__ = ("_patterns", "num_open")

    def __init__(self, stops: Sequence[str]) -> None:
        self._patterns = [_Pattern(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self.num_open = 0

    def feed(self, part: str, *, may_match: bool) -> Match | None:
        """Read on. Returns the first match that ends in `part`; with may_match false they are passed over."""
        best: Match | None = None
        for pattern in self._patterns:
            end = pattern.feed(part, may_match=may_match)
            if end is not None and (best is None or end < best.end):
                best = Match(pattern.text, end)
        self.num_open = max((pattern.state for pattern in self._patterns), default=0)
        return best


class _Pattern:
    """state: the length of the longest beginning of `text` that the characters read so far end with."""

    __slots__ = ("_fallback", "state", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.state = 0
        self._fallback = _fallbacks(text)

    def feed(self, part: str, *, may_match: bool) -> int | None:
        position = 0
        while position < len(part):
            if self.state == 0:
                position = part.find(self.text[0], position)
                if position < 0:
                    return None
            self._step(part[position])
            position += 1
            if self.state == len(self.text):
                self.state = self._fallback[-1]
                if may_match:
                    return position
        return None

    def _step(self, character: str) -> None:
        while self.state and self.text[self.state] != character:
            self.state = self._fallback[self.state - 1]
        self.state += self.text[self.state] == character


def _fallbacks(text: str) -> list[int]:
    """For each i, the length of the longest proper beginning of text[:i+1] that it also ends with."""
    fallbacks, state = [0], 0
    for character in text[1:]:
        while state and text[state] != character:
            state = fallbacks[state - 1]
        state += text[state] == character
        fallbacks.append(state)
    return fallbacks
