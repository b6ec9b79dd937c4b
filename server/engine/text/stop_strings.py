"""Finds the first stop string in text that arrives in parts, and how much of the text must be held back meanwhile.

The first match is the one whose last character comes first (of several, the longest). So the result depends on the
text alone and never on how tokens cut it. Special tokens are not part of the shown text. A stop string that names one
("<|im_end|>", or "\\n<|im_end|>") is looked for twice: as written out, and with the token in the name's place.

Why not `str.find`: patterns mix characters with token ids, and the worst case must stay linear. Tried, it is longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from server.engine.text.special_names import Symbol


@dataclass(frozen=True, slots=True)
class Match:
    """`stop` ends at `end` characters into the part it was found in (and may have begun in an earlier part).

    num_shown: how many of the last shown characters belong to it.
    """

    stop: str
    end: int
    num_shown: int


class StopMatcher:
    """Knuth-Morris-Pratt over one text, for each stop string: time is linear in the text whatever the strings are.

    symbols_of: a stop string with the ids of special tokens in place of their names. num_open: how many of the last
    characters fed may begin a stop string. reads_special: whether any stop string names a special token.
    """

    __slots__ = ("_mixed", "_patterns", "num_open", "reads_special")

    def __init__(self, stops: Sequence[str], symbols_of: Callable[[str], Sequence[Symbol]] = tuple) -> None:
        longest_first = sorted(set(stops), key=len, reverse=True)
        named = [(stop, symbols_of(stop)) for stop in longest_first]
        self._mixed = [_Pattern(stop, symbols) for stop, symbols in named if any(type(each) is int for each in symbols)]
        self._patterns = [*(_Pattern(stop, stop) for stop in longest_first), *self._mixed]
        self._patterns.sort(key=lambda pattern: len(pattern.text), reverse=True)
        self.num_open = 0
        self.reads_special = bool(self._mixed)

    def feed(self, part: str, *, may_match: bool) -> Match | None:
        """Read on. Returns the first match that ends in `part`; with may_match false, matches are passed over."""
        best: Match | None = None
        for pattern in self._patterns:
            end = pattern.feed(part, may_match=may_match)
            if end is not None and (best is None or end < best.end):
                best = Match(pattern.text, end, pattern.num_shown)
        self.num_open = max((pattern.num_open for pattern in self._patterns), default=0)
        return best

    def feed_special(self, token_id: int, *, may_match: bool, is_mid_character: bool) -> Match | None:
        """Read a special token. Stop strings that name none ignore it. is_mid_character: the text before it ends in an
        unfinished character."""
        best: Match | None = None
        for pattern in self._mixed:
            if pattern.feed_special(token_id, is_mid_character=is_mid_character) and may_match and best is None:
                best = Match(pattern.text, 0, pattern.num_shown)
        return best


class _Pattern:
    """symbols: the characters of `text`, or those with token ids among them. state: the length of the longest beginning
    of `symbols` that ends what was read so far. num_shown: how many of `symbols` are characters."""

    __slots__ = ("_fallback", "_num_shown", "_symbols", "state", "text")

    def __init__(self, text: str, symbols: Sequence[Symbol]) -> None:
        self.text = text
        self.state = 0
        self._symbols = symbols
        self._fallback = _fallbacks(symbols)
        self._num_shown = [0, *accumulate(type(symbol) is str for symbol in symbols)]

    @property
    def num_shown(self) -> int:
        return self._num_shown[-1]

    @property
    def num_open(self) -> int:
        """How many of the last shown characters belong to that beginning."""
        return self._num_shown[self.state]

    def feed(self, part: str, *, may_match: bool) -> int | None:
        position, first = 0, self._symbols[0]
        while position < len(part):
            if self.state == 0:
                position = part.find(first, position) if isinstance(first, str) else -1
                if position < 0:
                    return None
            is_whole = self._step(part[position])
            position += 1
            if is_whole and may_match:
                return position
        return None

    def feed_special(self, token_id: int, *, is_mid_character: bool) -> bool:
        if is_mid_character:
            self.state = 0
        return self._step(token_id)

    def _step(self, symbol: Symbol) -> bool:
        """Whether the whole pattern has now been read; a match may overlap the next."""
        while self.state and self._symbols[self.state] != symbol:
            self.state = self._fallback[self.state - 1]
        self.state += self._symbols[self.state] == symbol
        if self.state < len(self._symbols):
            return False
        self.state = self._fallback[-1]
        return True


def _fallbacks(symbols: Sequence[Symbol]) -> list[int]:
    """For each i, the length of the longest proper beginning of symbols[:i+1] that it also ends with."""
    fallbacks, state = [0], 0
    for symbol in symbols[1:]:
        while state and symbols[state] != symbol:
            state = fallbacks[state - 1]
        state += symbols[state] == symbol
        fallbacks.append(state)
    return fallbacks
