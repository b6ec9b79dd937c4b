"""Grammars of the simulated worlds: the product's own matchers over 97 tokens, and how a fake model draws under one."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from adapters_store.dialects.catalog import MISTRAL_ARGS
from server.engine.grammar.matcher import GrammarMatcher
from server.engine.grammar.spec import GrammarSpec
from server.engine.grammar.tokens import LIMITS, TokenTable
from server.engine.request import TokenConstraint
from server.engine.text.call_grammar import CallsPart, answer_grammar

_PLAIN = [bytes([code]) for code in range(0x20, 0x7E) if chr(code) != "`"] + [b"ab"]
_SPECIAL = [name.encode() for name in MISTRAL_ARGS.markers] + [b"<end>"]
NUM_TOKENS = len(_PLAIN) + len(_SPECIAL)  # of the fake model
END_ID = NUM_TOKENS - 1
TABLE = TokenTable((*_PLAIN, *_SPECIAL), tuple(range(len(_PLAIN), NUM_TOKENS)), (END_ID,))


@dataclass(frozen=True, slots=True)
class WorldGrammar:
    """follows: whether a whole answer's text is right, by something that knows no grammar."""

    spec: GrammarSpec
    follows: Callable[[str], bool]

    def start(self) -> WorldMatcher:
        return WorldMatcher(self)


class WorldMatcher(GrammarMatcher):
    """A request's constraint that knows which grammar it was made from."""

    def __init__(self, grammar: WorldGrammar) -> None:
        super().__init__(_compiled(grammar.spec).deep_copy(), NUM_TOKENS)
        self.grammar = grammar


def _is_word(text: str) -> bool:
    return re.fullmatch("[a-f]{1,6}(x[0-9]{2}){0,3}", text) is not None


def _is_list(text: str) -> bool:
    return all(value in ("ab", "c", 7) for value in json.loads(text))


def _is_call(text: str) -> bool:
    return re.fullmatch(r'\[TOOL_CALLS\]f\[ARGS\]\{"n": [12]\}', text) is not None


def _tool_grammar() -> str:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    calls = CallsPart(dialect=MISTRAL_ARGS, tools=[tool], choice="required", is_parallel=False)
    return answer_grammar({name: len(_PLAIN) + n for n, name in enumerate(MISTRAL_ARGS.markers)}, calls=calls)


GRAMMARS = (
    WorldGrammar(GrammarSpec("regex", "[a-f]{1,6}(x[0-9]{2}){0,3}"), _is_word),
    WorldGrammar(GrammarSpec("json_schema", '{"type":"array","items":{"enum":["ab","c",7]}}', True), _is_list),
    WorldGrammar(GrammarSpec("lark", _tool_grammar()), _is_call),
)


@cache
def _tokenizer() -> LLTokenizer:
    return TABLE.tokenizer()


@cache
def _compiled(spec: GrammarSpec) -> LLMatcher:
    matcher = LLMatcher(_tokenizer(), spec.compiled_form(), log_level=0, limits=LIMITS)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def drawn(state: int, constraint: TokenConstraint | None, output_ids: Sequence[int]) -> int:
    """The token that the fake model draws in this state after this output."""
    if constraint is None:
        return state % NUM_TOKENS
    constraint.advance(output_ids)
    allowed = np.flatnonzero(np.unpackbits(constraint.allowed(), bitorder="little")[:NUM_TOKENS])
    return int(allowed[state % len(allowed)])


def fresh(constraint: TokenConstraint | None) -> WorldMatcher | None:
    """The same grammar at its start, for the run alone."""
    return constraint.grammar.start() if isinstance(constraint, WorldMatcher) else None


def check_whole(constraint: TokenConstraint | None, output_ids: Sequence[int]) -> None:
    """A constraint that allows nothing more has an answer that follows its grammar."""
    if isinstance(constraint, WorldMatcher) and constraint.is_complete:
        text = b"".join(TABLE.tokens[id_] for id_ in output_ids if id_ != END_ID).decode()
        assert constraint.grammar.follows(text), f"{text!r} does not follow {constraint.grammar.spec}"


class WorldConstraints:
    """Gives a share of the requests a grammar, and knows which matchers still live."""

    def __init__(self, seed: int, share: float) -> None:
        self._random, self._share = Random(seed), share
        self.living: weakref.WeakSet[WorldMatcher] = weakref.WeakSet()
        self.num_given = self.num_whole = 0

    def draw(self) -> WorldMatcher | None:
        if self._random.random() >= self._share:
            return None
        matcher = self._random.choice(GRAMMARS).start()
        self.living.add(matcher)
        self.num_given += 1
        return matcher
