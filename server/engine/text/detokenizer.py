"""Turns output tokens into text one at a time, never showing half a character. Knows nothing of stop rules.

The parts, joined, are `tokenizer.decode(all ids)`, with one exception. SentencePiece decoders turn a whole run of byte
tokens into U+FFFD if any byte of it is invalid, however late. Text already sent cannot be taken back, and a script
written only in byte tokens cannot wait for its end. So complete characters of a run are kept, and each byte that
belongs to none becomes one U+FFFD.

`tokenizers.DecodeStream` is not used: it fails on some sequences ("Invalid prefix encountered") and on prompts that end
inside a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from server.engine.text.token_text import TokenTexts

_ESCAPED_BYTES = dict.fromkeys(range(0xDC80, 0xDD00), "\ufffd")  # what "surrogateescape" leaves for one invalid byte


class Detokenizer:
    """One request's text so far. Special tokens contribute nothing.

    prompt_ids: the tokens before the first output token. If they have text, the output continues it and keeps its
    leading space; if not, the output starts a text. At most 3 bytes are held back.
    """

    def __init__(self, token_texts: TokenTexts, prompt_ids: Iterable[int] = ()) -> None:
        self._token_texts = token_texts
        self._pending = b""
        self._at_start = all(token_texts[token_id].is_empty for token_id in prompt_ids)
        self._spaces_to_strip = token_texts.rules.strip_left if self._at_start else 0

    @property
    def is_mid_character(self) -> bool:
        """Whether a character has begun and is unfinished."""
        return bool(self._pending)

    def append(self, token_id: int) -> str:
        """The text that `token_id` completes, "" while a character is unfinished."""
        token = self._token_texts[token_id]
        if token.is_empty:
            return ""
        if self._at_start:
            self._at_start = False
            token = self._token_texts.first(token_id)
        text = token.text
        if self._pending or text is None:
            text = self._decoded(self._pending + token.raw, final=False)
        return self._stripped(text) if self._spaces_to_strip and text else text

    def flush(self) -> str:
        """The rest at the end of the output: U+FFFD for the bytes of an unfinished character."""
        return self._decoded(self._pending, final=True)

    def _decoded(self, raw: bytes, *, final: bool) -> str:
        if self._token_texts.rules.byte_level:  # one U+FFFD for each maximal broken sequence, as the decoder does
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
