"""Keeps the control tokens that a chat template writes apart from text that spells them. Knows no requests.

A message that holds "<|im_end|><|im_start|>system" would otherwise end its turn and open another. Names of control
tokens in a client's text are marked before the template sees them, and marked text of the rendered chat is tokenised as
text. transformers does the same (`sanitize_control_tokens`), but its tokenizer objects are not thread-safe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from server.engine.request import InvalidRequest, check_unicode
from server.engine.text.special_names import SpecialNames

_OPEN, _CLOSE, _INSIDE = "\ufdd0", "\ufdd1", "\ufdd2"  # noncharacters: no client's text needs them
_MARKS = f"{_OPEN}{_CLOSE}{_INSIDE}"
_MARKED = re.compile(f"{_OPEN}([^{_MARKS}]*{_INSIDE}?[^{_MARKS}]*){_CLOSE}|[{_MARKS}]")
_DROP_MARKS = str.maketrans("", "", _MARKS)


class ControlTokens:
    """backend: the tokenizer that encodes unmarked text. template: its literal text names further control tokens.
    plain: `without_added_tokens(backend)`, if it is there already.

    Control tokens are the special tokens, and those added tokens that the template names. Thread-safe.
    """

    def __init__(self, backend: FastTokenizer, template: str, plain: FastTokenizer | None = None) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._names = {
            id_: token.content
            for id_, token in added.items()
            if token.special or (token.content in template and not token.content.isspace())
        }
        self._forms = {id_: _form(name, is_split=added[id_].special) for id_, name in self._names.items()}
        self._finder = SpecialNames(self._names)
        self._plain = plain or without_added_tokens(backend)

    def marked(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The same fields, with control tokens' names marked in every string, however deep."""
        return {name: self._marked_value(value) for name, value in fields.items()}

    def _marked_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._marked(value)
        if isinstance(value, dict):
            return {self._marked(key): self._marked_value(member) for key, member in value.items()}
        return [self._marked_value(member) for member in value] if isinstance(value, list | tuple) else value

    def encode(self, chat: str) -> list[int]:
        """Token ids of a rendered chat. Raises InvalidRequest for a name that this tokenizer cannot encode as text."""
        check_unicode("messages", chat)
        ids: list[int] = []
        for number, part in enumerate(_MARKED.split(chat)):
            if not part:  # empty, or None for a mark without its partner
                continue
            is_text = number % 2 == 1
            text = part.replace(_INSIDE, "")
            encode = self._plain if is_text else self._backend
            part_ids = _continued(encode, text) if ids else encode.encode(text, add_special_tokens=False).ids
            if is_text and not self._names.keys().isdisjoint(part_ids):
                reason = f"messages: this tokenizer encodes {text[:40]!r} only as a control token"
                raise InvalidRequest("messages", reason)
            ids += part_ids
        return ids

    def _marked(self, text: str) -> str:
        symbols = self._finder.symbols(text.translate(_DROP_MARKS))
        return "".join(symbol if isinstance(symbol, str) else self._forms[symbol] for symbol in symbols)


def _form(name: str, *, is_split: bool) -> str:
    """The marked name. A special token's name is split by a mark, so a template that cuts its text never leaves
    the name whole. Other names stay whole, because templates look for them ("</think>")."""
    return f"{_OPEN}{name[0]}{_INSIDE}{name[1:]}{_CLOSE}" if is_split else f"{_OPEN}{name}{_CLOSE}"


def _continued(encode: FastTokenizer, text: str) -> list[int]:
    """Ids of `text` inside a longer one: at the start, some tokenizers put a space before it."""
    newline = encode.encode("\n", add_special_tokens=False).ids
    ids: list[int] = encode.encode(f"\n{text}", add_special_tokens=False).ids
    if ids[: len(newline)] == newline:
        return ids[len(newline) :]
    alone: list[int] = encode.encode(text, add_special_tokens=False).ids
    return alone


def without_added_tokens(backend: FastTokenizer) -> FastTokenizer:
    """The same tokenizer, for which every text is plain text."""
    state = json.loads(backend.to_str())
    state |= {"added_tokens": [], "post_processor": None}
    return FastTokenizer.from_str(json.dumps(state))
