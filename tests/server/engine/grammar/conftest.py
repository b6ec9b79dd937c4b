"""One compiler for the tiny base of the engine's tests: its processes start once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from server.engine.grammar.compiler import AskedGrammar, CompiledGrammar, GrammarCompiler, compiler_for
from server.engine.grammar.spec import GrammarSpec
from server.engine.text.tokenizer import Tokenizer
from support.models.tokenizer_zoo import byte_level, wrapped

Compile = Callable[..., CompiledGrammar]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(wrapped(byte_level()))


@pytest.fixture(scope="session")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = compiler_for(tokenizer, tokenizer.vocabulary(tokenizer.vocab_size))
    yield compiler
    compiler.close()


@pytest.fixture(scope="session")
def compiled(compiler: GrammarCompiler) -> Compile:
    """compiled(kind, text, tenant=...): raises InvalidRequest for the field `response_format`."""

    def compile_it(kind: Any, text: str, *, tenant: str = "acme", compact: bool = False) -> CompiledGrammar:
        return compiler.compiled(tenant, AskedGrammar("response_format", GrammarSpec(kind, text, compact)))

    return compile_it
