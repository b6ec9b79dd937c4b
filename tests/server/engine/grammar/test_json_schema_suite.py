"""The public JSON Schema Test Suite (draft 2020-12, MIT, as the `jsonschema` package ships it) against our masks.

A schema is served exactly or refused by name: no document that the suite calls invalid is ever accepted, and whatever a
random walk through the masks writes is valid. MULTILORA_GRAMMAR_WALKS sets the walks of each schema (CI: 1).
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from server.engine.grammar.checker import check
from server.engine.grammar.compiler import CompiledGrammar, GrammarCompiler
from server.engine.grammar.refusals import Refusal
from server.engine.grammar.spec import GrammarSpec
from server.engine.text.tokenizer import Tokenizer

NUM_WALKS = int(os.environ.get("MULTILORA_GRAMMAR_WALKS", "1"))
MAX_TOKENS = 200
SUITE: list[tuple[str, Any, list[tuple[Any, bool]]]] = json.loads(
    (Path(__file__).parent / "json_schema_suite.json").read_text()
)


@pytest.fixture(scope="module")
def served(compiler: GrammarCompiler) -> dict[int, CompiledGrammar]:
    """By index in the suite. In this process: what the suite holds is not hostile, and 368 round trips cost more."""
    tokenizer = compiler._ll_tokenizer()
    found = {}
    for index, (_, schema, _) in enumerate(SUITE):
        form = check(GrammarSpec("json_schema", json.dumps(schema), compact=True), tokenizer)
        if isinstance(form, Refusal):
            assert form.code in ("unsupported_grammar", "invalid_grammar", "grammar_too_complex")
        else:
            found[index] = compiler._compile(form)
    return found


def accepts(grammar: CompiledGrammar, tokenizer: Tokenizer, document: Any) -> bool:
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    matcher = grammar.start(())
    ids = tokenizer.encode(text, add_special_tokens=False)
    matcher.advance(ids)
    return matcher.failure is None and matcher._matcher.is_accepting()


def walked(grammar: CompiledGrammar, ending_ids: frozenset[int], seed: int) -> list[int] | None:
    """Tokens of a random answer; None if it did not end in time."""
    rng, matcher, ids = random.Random(seed), grammar.start(ending_ids), list[int]()
    while len(ids) < MAX_TOKENS:
        allowed = np.flatnonzero(np.unpackbits(matcher.allowed(), bitorder="little")).tolist()
        ends = [id_ for id_ in allowed if id_ in ending_ids]
        if ends:
            return ids
        short = [id_ for id_ in allowed if id_ < 120] or allowed
        ids.append(rng.choice(short))
        matcher.advance(ids)
        assert matcher.failure is None
        if matcher.is_complete:
            return ids
    return None


def _finite(text: str) -> float:
    """JSON has numbers that Python's floats have not."""
    return max(-1e300, min(float(text), 1e300))


def test_no_invalid_document_is_accepted(served: dict[int, CompiledGrammar], tokenizer: Tokenizer) -> None:
    wrong = [
        (SUITE[index][0], SUITE[index][1], document)
        for index, grammar in served.items()
        for document, is_valid in SUITE[index][2]
        if not is_valid and accepts(grammar, tokenizer, document)
    ]
    assert wrong == []
    assert len(served) > 100


def test_what_a_random_walk_writes_is_valid(served: dict[int, CompiledGrammar], tokenizer: Tokenizer) -> None:
    num_ended = 0
    for index, grammar in served.items():
        validator = jsonschema_rs.validator_for(SUITE[index][1])
        for walk in range(NUM_WALKS):
            ids = walked(grammar, tokenizer.chat_end_ids, seed=1000 * walk + index)
            if ids is not None:
                num_ended += 1
                text = b"".join(tokenizer.token_texts.token_bytes(id_) for id_ in ids).decode()
                value = json.loads(text, parse_float=_finite)
                assert validator.is_valid(value), (SUITE[index][1], text)
    print(f"{num_ended} answers of {len(served)} schemas validated; {len(SUITE) - len(served)} schemas refused")
    assert num_ended > len(served) / 3
