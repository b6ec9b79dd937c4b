"""An answer as parts that open, grow and close one after another: text, reasoning and calls. Knows no API's words.

OpenAI's responses and Anthropic's messages both show answers so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from server.api.generation.chat_answer import ChatAnswer
from server.engine.request import Mark
from server.engine.text.answer_reader import AnswerForm, Piece

Kind = Literal["text", "reasoning", "call"]


@dataclass(slots=True)
class Part:
    """index: among the answer's parts. call_id, name: of a call, whose text is its arguments."""

    kind: Kind
    index: int
    call_id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


class PartEvent(NamedTuple):
    """text: what a part that grows got."""

    type: Literal["open", "grow", "close"]
    part: Part
    text: str = ""


class PartedAnswer:
    """One answer. Feed it what the engine says, then `finish` once."""

    def __init__(self, form: AnswerForm | None) -> None:
        self._answer = ChatAnswer(form)
        self.parts: list[Part] = []

    def feed(self, text: str, marks: Sequence[Mark] = ()) -> list[PartEvent]:
        return [event for piece in self._answer.pieces(text, marks) for event in self._events_of(piece)]

    def finish(self) -> list[PartEvent]:
        events = [event for piece in self._answer.last_pieces() for event in self._events_of(piece)]
        return [*events, *self._closed()]

    def finish_reason(self, reason: str | None) -> str | None:
        """As chats name it: "tool_calls" if the answer ends with a whole call."""
        return self._answer.finish_reason(reason)

    def _events_of(self, piece: Piece) -> Iterator[PartEvent]:
        if piece.kind == "name":
            yield from self._opened("call", self._answer.new_call_id(), piece.text)
            return
        kind: Kind = "call" if piece.kind == "arguments" else piece.kind
        if not self.parts or self.parts[-1].kind != kind:
            yield from self._opened(kind)
        self.parts[-1].texts.append(piece.text)
        yield PartEvent("grow", self.parts[-1], piece.text)

    def _opened(self, kind: Kind, call_id: str = "", name: str = "") -> Iterator[PartEvent]:
        yield from self._closed()
        self.parts.append(Part(kind, len(self.parts), call_id, name))
        yield PartEvent("open", self.parts[-1])

    def _closed(self) -> Iterator[PartEvent]:
        if self.parts:
            yield PartEvent("close", self.parts[-1])
