"""Finds the names of special tokens in text. Knows names and ids; knows nothing of requests.

A tokenizer has up to some thousand special tokens, and the text comes from users. A trie reads each character about
once, whatever the names are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Symbol = str | int  # one character of a text, or the id of the special token that is named there


class SpecialNames:
    """names: special token id -> its name. The longest name that begins at a position counts."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._root: dict[Any, Any] = {}
        for id_, name in names.items():
            self._add(name, id_)

    def symbols(self, text: str) -> tuple[Symbol, ...]:
        """`text` as characters, with the id in place of each name."""
        symbols: list[Symbol] = []
        position = 0
        while position < len(text):
            end, id_ = self._name_at(text, position)
            symbols.append(text[position] if id_ is None else id_)
            position = position + 1 if id_ is None else end
        return tuple(symbols)

    def _add(self, name: str, id_: int) -> None:
        node = self._root
        for character in name:
            node = node.setdefault(character, {})
        if name:
            node.setdefault(None, id_)

    def _name_at(self, text: str, position: int) -> tuple[int, int | None]:
        """Where the longest name that begins at `position` ends, and its id; None if no name begins there."""
        node, found = self._root, (position, None)
        while position < len(text) and text[position] in node:
            node = node[text[position]]
            position += 1
            if None in node:
                found = (position, node[None])
        return found
