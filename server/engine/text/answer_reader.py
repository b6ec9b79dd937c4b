"""Reads reasoning, text and tool calls out of an answer as it grows. Knows a dialect; knows no grammar.

The answer's grammar leaves one way to read it, and the reader goes that way: it passes over fixed parts symbol by
symbol, a name ends where the next part begins, and arguments end with the bracket that closes them. A symbol is a
character, or the id of a marker's token; so a marker that ordinary tokens spell is text. If only some characters
can end what is being read, those before the next of them are read at once.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Literal, NamedTuple

from adapters_store.dialects.dialect import Dialect, Marker, Maybe, Part
from adapters_store.dialects.reasoning import ReasoningMarks
from server.engine.request import Mark, ReasoningIds
from server.engine.text.special_names import Symbol

Kind = Literal["reasoning", "text", "name", "arguments"]
_Walk = Generator[None, Symbol | None, None]
_Test = Generator[None, Symbol | None, bool]


class _Run(NamedTuple):
    """What is being read. plain: characters that are read as this kind, whatever follows."""

    kind: Kind
    plain: re.Pattern[str]
    number: int = 0


class Piece(NamedTuple):
    """number: of the call that a name or arguments belong to."""

    kind: Kind
    text: str
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """What an answer may hold. marker_ids: the token of each marker that has one. shown: the text that such a token
    makes in the answer, none for a special token. starts_in_reasoning: the prompt opened the reasoning."""

    marker_ids: Mapping[str, int] = field(default_factory=dict)
    shown: Mapping[int, str] = field(default_factory=dict)
    dialect: Dialect | None = None
    reasoning: ReasoningMarks | None = None
    starts_in_reasoning: bool = False

    @property
    def is_plain(self) -> bool:
        """All of the answer is text: nothing needs to be read out of it."""
        return self.dialect is None and self.reasoning is None

    @property
    def mark_ids(self) -> frozenset[int]:
        """The tokens whose places the reader must be given."""
        return frozenset(self.marker_ids.values())

    @property
    def reasoning_ids(self) -> ReasoningIds | None:
        """The tokens that mark the reasoning; None if there is none, or if a mark has no token of its own."""
        if self.reasoning is None or self.reasoning.close not in self.marker_ids:
            return None
        if not self.starts_in_reasoning and self.reasoning.open not in self.marker_ids:
            return None
        opens = None if self.starts_in_reasoning else self.marker_ids[self.reasoning.open]
        return ReasoningIds(opens, self.marker_ids[self.reasoning.close])

    def symbols(self, part: Part) -> tuple[Symbol, ...]:
        if isinstance(part, Marker):
            id_ = self.marker_ids.get(part.name)
            return tuple(part.name) if id_ is None else (id_,)
        return tuple(part.text if isinstance(part, Maybe) else part)

    def all_symbols(self, parts: Sequence[Part]) -> list[Symbol]:
        return [symbol for part in parts for symbol in self.symbols(part)]


class AnswerReader:
    """Feed it the answer's text and marks, then `finish` once. The pieces, joined by kind and call, do not depend on
    how the answer was cut."""

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self._num_to_skip = 0  # characters that the last marker's token shows
        self._pieces: list[Piece] = []
        self._symbol: Symbol | None = None  # the next one; None after the last
        self._run: _Run | None = None  # what plain characters are now
        self._num_begun = self._num_whole = 0
        self._again: deque[Symbol | None] = deque()  # read while something was tried in vain
        self._walk = self._answer()
        next(self._walk)

    @property
    def has_whole_calls(self) -> bool:
        """Whether there are calls, and the last one's arguments are complete."""
        return 0 < self._num_begun == self._num_whole

    def feed(self, text: str, marks: Sequence[Mark] = ()) -> list[Piece]:
        """What this much more of the answer adds. marks: places of markers' tokens in this text, in order."""
        start = 0
        for place, id_ in (*marks, (len(text), None)):
            skipped = min(self._num_to_skip, place - start)
            self._num_to_skip -= skipped
            self._read(text, start + skipped, place)
            start = place
            if id_ is not None:
                self._num_to_skip = len(self._form.shown.get(id_, ""))
                self._walk.send(id_)
        return self._taken()

    def finish(self) -> list[Piece]:
        """What was held back at the end."""
        for _ in self._walk:  # sends None until the walk ends
            continue
        return self._taken()

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        if len(pieces) < 2:
            return pieces
        groups = groupby(pieces, key=lambda piece: (piece.kind, piece.number))
        return [Piece(kind, "".join(piece.text for piece in group), number) for (kind, number), group in groups]

    def _read(self, text: str, start: int, stop: int) -> None:
        """Its characters from start to stop."""
        while start < stop:
            run = self._run
            end = start if run is None or (plain := run.plain.match(text, start, stop)) is None else plain.end()
            if run is None or end == start:
                self._walk.send(text[start])
                start += 1
            else:
                self._pieces.append(Piece(run.kind, text[start:end], run.number))
                start = end

    def _emit(self, kind: Kind, symbol: Symbol, number: int = 0) -> None:
        text = symbol if isinstance(symbol, str) else self._form.shown.get(symbol, "")
        if text:
            self._pieces.append(Piece(kind, text, number))

    def _advance(self, run: _Run | None = None) -> _Walk:
        """To the next symbol. run: characters before it that the walk need not see."""
        if self._again:
            self._symbol = self._again.popleft()
            return
        self._run = run
        self._symbol = yield
        self._run = None

    def _answer(self) -> _Walk:
        form = self._form
        yield from self._advance()
        marks = form.reasoning
        if marks is not None and (form.starts_in_reasoning or (yield from self._passes(Marker(marks.open)))):
            yield from self._reasoning(marks)
        if form.dialect is not None and (yield from self._trigger(form.dialect)):
            yield from self._calls(form.dialect)
        run = _Run("text", _all_but(""))
        while self._symbol is not None:
            self._emit("text", self._symbol)
            yield from self._advance(run)

    def _reasoning(self, marks: ReasoningMarks) -> _Walk:
        """Without the line ends at its edges, and those before the answer."""
        run = _Run("reasoning", _all_but("\n" + self._first_character(Marker(marks.close))))
        line_ends: int | None = None  # None: nothing but line ends yet
        while self._symbol is not None and not (yield from self._passes(Marker(marks.close))):
            if self._symbol == "\n":
                line_ends = None if line_ends is None else line_ends + 1
            else:
                for _ in range(line_ends or 0):
                    self._emit("reasoning", "\n")
                line_ends = 0
                self._emit("reasoning", self._symbol)
            yield from self._advance(run if line_ends == 0 else None)
        while self._symbol == "\n":
            yield from self._advance()

    def _trigger(self, dialect: Dialect) -> _Test:
        """Text up to the first call, and the call's first part; false for an answer without a call."""
        if not isinstance(dialect.trigger, Marker):
            return (yield from self._passes(dialect.trigger, after_blanks=True))
        run = _Run("text", _all_but(self._first_character(dialect.trigger)))
        while self._symbol is not None:
            if (yield from self._passes(dialect.trigger)):
                return True
            self._emit("text", self._symbol)
            yield from self._advance(run)
        return False

    def _calls(self, dialect: Dialect) -> _Walk:
        first_parts = (*dialect.begin, *dialect.opening)[1:]
        yield from self._pass(first_parts)
        yield from self._call(dialect, 0)
        number = 1
        while dialect.between is not None and (yield from self._passes(*dialect.between)):
            yield from self._pass(dialect.opening)
            yield from self._call(dialect, number)
            number += 1
        yield from self._rest(dialect)

    def _rest(self, dialect: Dialect) -> _Walk:
        """Over the end of the calls. An answer that is cut may end within it, or within what precedes another call."""
        rest: list[Symbol] = []
        while self._symbol is not None:
            rest.append(self._symbol)
            yield from self._advance()
        ends = [self._form.all_symbols(parts) for parts in (dialect.end, dialect.between or ())]
        assert any(end[: len(rest)] == rest for end in ends), f"{dialect}: read {rest!r} after its calls"

    def _first_character(self, part: Part) -> str:
        """With which this part begins; none if that is a marker's token."""
        first = self._form.symbols(part)[0]
        return first if isinstance(first, str) else ""

    def _call(self, dialect: Dialect, number: int) -> _Walk:
        """From its name on."""
        after_name = self._form.symbols(dialect.middle[0])[0]
        name: list[str] = []
        while isinstance(self._symbol, str) and self._symbol != after_name:
            name.append(self._symbol)
            yield from self._advance()
        if self._symbol is not None:
            self._pieces.append(Piece("name", "".join(name), number))
            self._num_begun += 1
        yield from self._pass(dialect.middle)
        yield from self._arguments(number)
        yield from self._pass(dialect.closing)

    def _arguments(self, number: int) -> _Walk:
        """A JSON object, as it is."""
        inside, outside = (_Run("arguments", _all_but(ends), number) for ends in ('"\\', '"{}[]'))
        depth, in_string, is_escaped = 0, False, False
        while self._symbol is not None:
            symbol = self._symbol
            self._emit("arguments", symbol, number)
            if is_escaped:
                is_escaped = False
            elif in_string:
                is_escaped, in_string = symbol == "\\", symbol != '"'
            elif symbol == '"':
                in_string = True
            else:
                depth += (symbol in ("{", "[")) - (symbol in ("}", "]"))
                if depth == 0:
                    self._num_whole += 1
                    yield from self._advance()
                    return
            yield from self._advance(None if is_escaped else inside if in_string else outside)

    def _pass(self, parts: Sequence[Part]) -> _Walk:
        """Over parts that the grammar forces; the answer may end in them."""
        for part in parts:
            if isinstance(part, Maybe):
                yield from self._passes(part)
                continue
            for expected in self._form.symbols(part):
                if self._symbol is None:
                    return
                assert self._symbol == expected, f"{self._form.dialect}: read {self._symbol!r} in place of {expected!r}"
                yield from self._advance()

    def _passes(self, *parts: Part, after_blanks: bool = False) -> _Test:
        """Whether these parts come next; if not, nothing has been read."""
        read: list[Symbol | None] = []
        while after_blanks and isinstance(self._symbol, str) and self._symbol.isspace():
            read.append(self._symbol)
            yield from self._advance()
        for expected in self._form.all_symbols(parts):
            if self._symbol != expected:
                if read:
                    self._again.extendleft([self._symbol, *reversed(read)])
                    yield from self._advance()
                return False
            read.append(self._symbol)
            yield from self._advance()
        return True


@cache
def _all_but(characters: str) -> re.Pattern[str]:
    return re.compile(f"[^{re.escape(characters)}]+" if characters else ".+", re.DOTALL)
