"""A base's tokens as llguidance reads them. Runs in the checker's process too, so it imports nothing large."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

# What one grammar may cost. Speeds by llguidance: initial fuel 50k a ms, fuel of a step 14k, items of a step 20k.
LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=30_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class TokenTable:
    """tokens: the bytes of each id, b"" for an id that is not served. special_ids: tokens that no text spells.

    ending_ids: those that may end an answer; the first is llguidance's own end of sequence.
    """

    tokens: tuple[bytes, ...]
    special_ids: tuple[int, ...]
    ending_ids: tuple[int, ...]

    def to_json(self) -> str:
        return json.dumps([[token.decode("latin-1") for token in self.tokens], self.special_ids, self.ending_ids])

    @classmethod
    def from_json(cls, text: str) -> TokenTable:
        tokens, special_ids, ending_ids = json.loads(text)
        return cls(tuple(token.encode("latin-1") for token in tokens), tuple(special_ids), tuple(ending_ids))

    def tokenizer(self, encode: Encode | None = None) -> LLTokenizer:
        """Takes about a second for 100,000 tokens. encode: the base's own tokenizer; None: the longest token first."""
        return LLTokenizer(
            TokenizerWrapper(_Tokens(self, encode or self.longest_first)),
            n_vocab=len(self.tokens),
            eos_token=list(self.ending_ids),
        )

    def longest_first(self, text: str) -> list[int]:
        data, ids, position = text.encode(), [], 0
        while position < len(data):
            for size in range(min(self._longest, len(data) - position), 0, -1):
                id_ = self._id_of.get(data[position : position + size])
                if id_ is not None:
                    ids.append(id_)
                    break
            else:
                size = 1
            position += size
        return ids

    @cached_property
    def _id_of(self) -> dict[bytes, int]:
        special = set(self.special_ids)
        return {token: id_ for id_, token in enumerate(self.tokens) if token and id_ not in special}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._id_of), default=1)


class _Tokens:
    """What `TokenizerWrapper` asks for."""

    def __init__(self, table: TokenTable, encode: Encode) -> None:
        self.eos_token_id = table.ending_ids[0]
        self.bos_token_id = None
        self.tokens = table.tokens
        self.special_token_ids = table.special_ids
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode(errors="replace"))
