"""Turns output tokens into text one at a time, never showing half a character. Knows nothing of stop rules.

What comes out, joined, is `tokenizer.decode(all ids)`, with one exception. SentencePiece decoders turn a whole run of
byte tokens into U+FFFD when any byte of it is invalid, however late; text already sent cannot be taken back, and a
script written only in byte tokens cannot wait for its end. So complete characters of a run are kept, and each byte that
is part of none becomes one U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from server.engine.text.token_text import PieceTable

_ESCAPED_BYTES = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")  # what "surrogateescape" leaves for one invalid byte


class Detokenizer:
    """One request's text so far. Special tokens contribute nothing.

    prompt_ids: the tokens before the first output token. Where they have text, the output continues it and keeps its
    leading space; where not, the output is the start of a text. At most 3 bytes are ever held back.
    """

    __slots__ = ("_at_start", "_pending", "_pieces", "_spaces_to_strip")

    def __init__(self, pieces: PieceTable, prompt_ids: Iterable[int] = ()) -> None:
        self._pieces = pieces
        self._pending = b""
        self._at_start = all(pieces[token_id].is_empty for token_id in prompt_ids)
        self._spaces_to_strip = pieces.rules.strip_left if self._at_start else 0

    @property
    def has_half(self) -> bool:
        """Whether a character has begun and is unfinished."""
        return bool(self._pending)

    def append(self, token_id: int) -> str:
        """The text that `token_id` completes, "" while a character is unfinished."""
        piece = self._pieces[token_id]
        if piece.is_empty:
            return ""
        if self._at_start:
            self._at_start = False
            piece = self._pieces.first(token_id)
        text = piece.text
        if self._pending or text is None:
            text = self._decoded(self._pending + piece.raw, final=False)
        return self._stripped(text) if self._spaces_to_strip and text else text

    def flush(self) -> str:
        """What is left at the end of the output: U+FFFD for bytes that no character was made of."""
        return self._decoded(self._pending, final=True)

    def _decoded(self, raw: bytes, *, final: bool) -> str:
        if self._pieces.rules.byte_level:  # one U+FFFD for each maximal broken sequence, as the decoder does
            text, used = codecs.utf_8_decode(raw, "replace", final)
        else:  # one U+FFFD for each byte
            text, used = codecs.utf_8_decode(raw, "surrogateescape", final)
            text = text.translate(_ESCAPED_BYTES)
        self._pending = raw[used:]
        return text

    def _stripped(self, text: str) -> str:
        kept = text.lstrip(" ")
        num_stripped = min(len(text) - len(kept), self._spaces_to_strip)
        self._spaces_to_strip = 0 if kept else self._spaces_to_strip - num_stripped
        return text[num_stripped:]


def text_offsets(pieces: PieceTable, token_ids: Iterable[int], start: int = 0) -> list[int]:
    """Where in the text of `token_ids` each token begins, in characters, counted from `start`.

    A token inside a character begins where that character does.
    """
    detokenizer, offsets, position = Detokenizer(pieces), [], start
    for token_id in token_ids:
        offsets.append(position)
        position += len(detokenizer.append(token_id))
    return offsets
