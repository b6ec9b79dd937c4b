"""One chat answer in OpenAI's shape: reasoning, content and tool calls, whole or in deltas. Knows no stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from adapters_store.dialects.dialect import PLAIN_ID_CHARS
from server.engine.request import Mark
from server.engine.text.answer_reader import AnswerForm, AnswerReader, Piece


class ChatAnswer:
    """form None: all of the answer is content."""

    def __init__(self, form: AnswerForm | None) -> None:
        self._reader = None if form is None else AnswerReader(form)
        self._id_chars = PLAIN_ID_CHARS if form is None or form.dialect is None else form.dialect.call_id_chars

    def pieces(self, text: str, marks: Sequence[Mark] = ()) -> list[Piece]:
        """What this much more of the answer's text adds."""
        if self._reader is None:
            return [Piece("text", text)] if text else []
        return self._reader.feed(text, marks)

    def last_pieces(self) -> list[Piece]:
        """What was held back until the end of the answer."""
        return [] if self._reader is None else self._reader.finish()

    def deltas(self, text: str, marks: Sequence[Mark] = ()) -> list[dict[str, Any]]:
        """As `pieces`."""
        return list(map(self._delta, self.pieces(text, marks)))

    def last_deltas(self) -> list[dict[str, Any]]:
        """As `last_pieces`."""
        return list(map(self._delta, self.last_pieces()))

    def finish_reason(self, reason: str | None) -> str | None:
        has_calls = self._reader is not None and self._reader.has_whole_calls
        return "tool_calls" if reason == "stop" and has_calls else reason

    def message(self, deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """All deltas as one message. The content of an answer that is only calls is null."""
        content = "".join(delta.get("content", "") for delta in deltas)
        reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
        calls: list[dict[str, Any]] = []
        for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
            if "id" in part:
                named = {"name": part["function"]["name"], "arguments": ""}
                calls.append({"id": part["id"], "type": "function", "function": named})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        message: dict[str, Any] = {"content": None if calls and not content else content}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        return message | ({"tool_calls": calls} if calls else {})

    def _delta(self, piece: Piece) -> dict[str, Any]:
        match piece.kind:
            case "text":
                return {"content": piece.text}
            case "reasoning":
                return {"reasoning_content": piece.text}
            case "name":
                function = {"name": piece.text, "arguments": ""}
                call = {"index": piece.number, "id": self.new_call_id(), "type": "function", "function": function}
                return {"tool_calls": [call]}
            case "arguments":
                return {"tool_calls": [{"index": piece.number, "function": {"arguments": piece.text}}]}

    def new_call_id(self) -> str:
        """Mistral's templates take nine letters and digits and nothing else."""
        digits = uuid4().hex[: self._id_chars]
        return digits if self._id_chars < PLAIN_ID_CHARS else f"call_{digits}"
