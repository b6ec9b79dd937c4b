"""Grammars for the tiny base of the engine's tests: short answers, and whether a whole one is right."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from adapters_store.dialects.catalog import MISTRAL_ARGS
from server.engine.grammar.compiler import CompiledGrammar, GrammarCompiler, compiler_for
from server.engine.grammar.matcher import GrammarMatcher
from server.engine.grammar.spec import GrammarSpec
from server.engine.text.call_grammar import CallsPart, answer_grammar
from server.engine.text.tokenizer import Tokenizer
from support.models.tokenizer_zoo import byte_level, wrapped

SCHEMA = {"type": "object", "properties": {"n": {"enum": [7, 8, 15]}}, "required": ["n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
CALL = answer_grammar({}, calls=CallsPart(dialect=MISTRAL_ARGS, tools=[TOOL], choice="required", is_parallel=False))


@cache
def _compiler() -> GrammarCompiler:
    tokenizer = Tokenizer(wrapped(byte_level()))
    return compiler_for(tokenizer, tokenizer.vocabulary(tokenizer.vocab_size))


@cache
def _compiled(spec: GrammarSpec) -> CompiledGrammar:
    """In this process: none of these is hostile."""
    return _compiler()._compile(spec.compiled_form())


@dataclass(frozen=True)
class ShortGrammar:
    """max_tokens: enough for every whole answer. living: the matchers that something still holds."""

    spec: GrammarSpec
    max_tokens: int
    follows: Callable[[str], bool]
    living: weakref.WeakSet[GrammarMatcher] = field(default_factory=weakref.WeakSet)

    def start(self) -> GrammarMatcher:
        matcher = _compiled(self.spec).start(())
        self.living.add(matcher)
        return matcher

    def check_whole(self, token_ids: Sequence[int]) -> None:
        tokens = _compiler()._table().tokens
        text = b"".join(tokens[id_] for id_ in token_ids).decode()
        assert self.follows(text), text


def short_grammars() -> list[ShortGrammar]:
    """A schema, an expression and a call of a tool."""
    return [
        ShortGrammar(GrammarSpec("json_schema", json.dumps(SCHEMA), compact=True), 12, _is_object),
        ShortGrammar(GrammarSpec("regex", "[a-f]{4}x[0-9]{3}"), 12, _is_word),
        ShortGrammar(GrammarSpec("lark", CALL), 40, _is_call),
    ]


def _is_object(text: str) -> bool:
    return json.loads(text) in [{"n": number} for number in (7, 8, 15)]


def _is_word(text: str) -> bool:
    return re.fullmatch("[a-f]{4}x[0-9]{3}", text) is not None


def _is_call(text: str) -> bool:
    return re.fullmatch(r'\[TOOL_CALLS\]f\[ARGS\]\{"n": (7|8|15)\}', text) is not None
