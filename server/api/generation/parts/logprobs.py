"""Log-probabilities in the two shapes OpenAI gives them: parallel lists for completions, a list of objects for chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from server.api.wire.json_text import json_text
from server.engine.request import TokenLogprob
from server.engine.sampling.logprobs import LOWEST_LOGPROB
from server.engine.text.detokenizer import Detokenizer
from server.engine.text.token_text import TokenTexts

SLICE = 128  # tokens; with 20 alternatives each about a millisecond of the JSON encoder
_COLUMNS = ("text_offset", "token_logprobs", "tokens", "top_logprobs")

T = TypeVar("T")
Entries = Sequence[tuple[int, TokenLogprob | None]]  # None: the first token of a prompt, which nothing predicts


def _slices(entries: Sequence[T]) -> Iterator[Sequence[T]]:
    """Few enough that no single call of the JSON encoder, which other threads wait for, is long."""
    for start in range(0, len(entries), SLICE):
        yield entries[start : start + SLICE]


def finite(logprob: float) -> float:
    """JSON has neither minus infinity nor NaN."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


class CompletionLogprobs:
    """One choice's `logprobs`, token by token. context_ids: what precedes the choice's text and is no part of it."""

    def __init__(self, token_texts: TokenTexts, context_ids: Sequence[int] = ()) -> None:
        self._token_texts = token_texts
        self._detokenizer = Detokenizer(token_texts, context_ids)
        self._num_chars = 0

    def block(self, entries: Entries) -> str:
        """JSON of the next tokens as OpenAI's parallel lists. text_offset counts characters from the text's start."""
        parts: dict[str, list[str]] = {name: [] for name in _COLUMNS}
        for some in _slices(entries):
            for name, values in self._columns(some).items():
                parts[name].append(json_text(values)[1:-1])
        lists = (f'"{name}":[{",".join(values)}]' for name, values in parts.items())
        return f"{{{','.join(lists)}}}"

    def _columns(self, entries: Entries) -> dict[str, list[Any]]:
        return {
            "text_offset": [self._advance(token_id) for token_id, _ in entries],
            "token_logprobs": [None if entry is None else finite(entry.logprob) for _, entry in entries],
            "tokens": [self._token_texts.display(token_id) for token_id, _ in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for _, entry in entries],
        }

    def _advance(self, token_id: int) -> int:
        offset = self._num_chars
        self._num_chars += len(self._detokenizer.append(token_id))
        return offset

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The best alternatives, and always the chosen token: up to logprobs + 1 entries."""
        result: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            result.setdefault(self._token_texts.display(token_id), finite(logprob))
        return result


def chat_logprobs(token_texts: TokenTexts, entries: Sequence[TokenLogprob]) -> str:
    """JSON of the `logprobs` object of a chat choice or chunk."""
    parts = [json_text([_chat_entry(token_texts, entry) for entry in some])[1:-1] for some in _slices(entries)]
    return f'{{"content":[{",".join(parts)}],"refusal":null}}'


def _chat_entry(token_texts: TokenTexts, entry: TokenLogprob) -> dict[str, Any]:
    top = [_chat_token(token_texts, token_id, logprob) for token_id, logprob in entry.top]
    return {**_chat_token(token_texts, entry.token_id, entry.logprob), "top_logprobs": top}


def _chat_token(token_texts: TokenTexts, token_id: int, logprob: float) -> dict[str, Any]:
    raw = token_texts.token_bytes(token_id)
    return {"token": token_texts.display(token_id), "logprob": finite(logprob), "bytes": list(raw)}
