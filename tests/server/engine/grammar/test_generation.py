"""Constrained requests in the engine's mixed batches: every answer follows its grammar, and no other row changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import accumulate, cycle
from typing import Any

import pytest
from llguidance import LLMatcher, LLParserLimits

from server.engine.grammar.compiler import CompiledGrammar, GrammarCompiler
from server.engine.grammar.matcher import GrammarMatcher
from server.engine.grammar.spec import GrammarSpec
from server.engine.request import TokenEvent
from support.servers.service import NUM_TOKENS, Service

Compile = Callable[..., CompiledGrammar]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["law", "med"]}},
    "required": ["n", "kind"],
    "additionalProperties": False,
}
SAMPLED = {"temperature": 1.0, "max_tokens": 60, "ignore_eos": False}


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def generated(service: Service, grammar: CompiledGrammar, prompt: list[int], **params: Any) -> list[TokenEvent]:
    eos_ids = () if params.get("ignore_eos") else service.worker.tokenizer.eos_ids
    _, answer = service.ask(prompt, constraint=grammar.start(eos_ids), **{**SAMPLED, **params})
    return answer.collect()


@pytest.fixture
def schema(compiled: Compile) -> CompiledGrammar:
    return compiled("json_schema", json.dumps(SCHEMA), compact=True)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"seed": 3},
        {"top_k": 5, "seed": 1},
        {"top_p": 0.5, "min_p": 0.1},
        {"repetition_penalty": 1.8, "presence_penalty": 1.0, "frequency_penalty": 1.0},
        {"min_tokens": 50},
        {"ignore_eos": True},
        {"logit_bias": ((20, 100.0), (21, -100.0))},
        {"logprobs": 3},
        {"stop": ("never said",)},
    ],
    ids=str,
)
def test_an_answer_follows_its_grammar_whatever_the_sampling_parameters(
    service: Service, schema: CompiledGrammar, prompts: list[list[int]], params: dict[str, Any]
) -> None:
    events = generated(service, schema, prompts[0], **params)
    value = json.loads(text_of(events))
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", None)
    assert list(value) == ["n", "kind"]
    assert value["n"] in range(100)
    assert value["kind"] in ("law", "med")
    if "logprobs" in params:
        assert all(len(entry.top) == 3 for event in events for entry in event.logprobs or ())


def test_a_marker_that_completes_its_grammar_keeps_its_place(
    service: Service, compiled: Compile, prompts: list[list[int]]
) -> None:
    """As the marker behind the last of the calls does, if no further call is allowed."""
    [marker] = service.worker.tokenizer.encode("<s>", add_special_tokens=False)
    grammar = compiled("lark", f'%llguidance {{}}\nstart: "ab" <[{marker}]>')
    events = generated(service, grammar, prompts[0], mark_ids=frozenset({marker}))
    starts = accumulate((len(event.text) for event in events), initial=0)
    marks = [(start + place, id_) for start, event in zip(starts, events, strict=False) for place, id_ in event.marks]
    assert (text_of(events), marks) == ("ab", [(2, marker)])
    assert events[-1].finish_reason == "stop"


def test_rows_without_a_grammar_keep_their_bits_beside_rows_with_one(
    service: Service, adapters: dict[str, Any], compiled: Compile, prompts: list[list[int]]
) -> None:
    grammars = [
        compiled("json_schema", json.dumps(SCHEMA), compact=True),
        compiled("regex", "[a-f]{12}"),
        compiled("choice", json.dumps(["yes", "no", "maybe later"])),
    ]
    plain: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.7, "seed": 6, "top_p": 0.8, "logprobs": 2},
    ]
    asks = list(zip(prompts[:12], cycle(plain), cycle([None, *adapters]), strict=False))

    def whole_batch(with_grammars: bool) -> list[list[tuple[list[int], object]]]:
        with service.held():
            answers = []
            for index, (prompt, params, adapter) in enumerate(asks):
                answers.append(service.ask(prompt, adapter, max_tokens=14, **params)[1])
                if with_grammars:
                    grammar = grammars[index % 3].start(())
                    service.ask(prompt[:7], adapter, constraint=grammar, max_tokens=14, temperature=1.0)
        return [[(event.token_ids, event.logprobs) for event in answer.collect()] for answer in answers]

    assert whole_batch(with_grammars=True) == whole_batch(with_grammars=False)


def test_the_same_seed_gives_the_same_constrained_answer_in_any_batch(
    service: Service, schema: CompiledGrammar, prompts: list[list[int]]
) -> None:
    alone = [generated(service, schema, prompts[0], seed=seed) for seed in range(6)]
    with service.held():
        answers = [
            service.ask(prompts[0], constraint=schema.start(service.worker.tokenizer.eos_ids), **SAMPLED, seed=seed)[1]
            for seed in range(6)
        ]
    together = [answer.collect() for answer in answers]
    assert [text_of(events) for events in together] == [text_of(events) for events in alone]
    assert len({text_of(events) for events in alone}) > 1


def test_where_the_grammar_accepts_the_model_may_end_or_go_on(
    service: Service, compiled: Compile, prompts: list[list[int]]
) -> None:
    digits = compiled("regex", "[0-9]{1,40}")
    ends = service.worker.tokenizer.eos_ids
    wanted, unwanted = (tuple((end, bias) for end in ends) for bias in (100.0, -100.0))
    eager = generated(service, digits, prompts[1], logit_bias=wanted)
    assert (eager[-1].num_output_tokens, eager[-1].finish_reason) == (2, "stop")  # a token of digits, and the end
    long = generated(service, digits, prompts[1], logit_bias=wanted, min_tokens=6)
    assert 6 <= long[-1].num_output_tokens <= 7
    endless = generated(service, digits, prompts[1], logit_bias=wanted, ignore_eos=True)
    assert (len(text_of(endless)), endless[-1].finish_reason) == (40, "stop")
    short = generated(service, digits, prompts[1], logit_bias=unwanted, max_tokens=4)
    assert (re.fullmatch("[0-9]{4,12}", text_of(short)) is not None, short[-1].finish_reason) == (True, "length")


def test_a_stop_string_ends_a_constrained_answer_in_its_middle(
    service: Service, schema: CompiledGrammar, prompts: list[list[int]]
) -> None:
    events = generated(service, schema, prompts[0], stop=('"kind"',))
    assert re.fullmatch(r'\{"n":[0-9]+,', text_of(events))
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", '"kind"')


def test_an_answer_that_is_whole_at_its_last_token_ends_by_the_grammar(
    service: Service, compiled: Compile, prompts: list[list[int]]
) -> None:
    word = compiled("choice", '["x"]')
    events = generated(service, word, prompts[2], max_tokens=1)
    assert (text_of(events), events[-1].finish_reason) == ("x", "stop")


def test_a_grammar_that_becomes_too_complex_fails_its_request_alone(
    service: Service, compiler: GrammarCompiler, prompts: list[list[int]]
) -> None:
    form = GrammarSpec("regex", "[ab]*a[ab]{20}").compiled_form()
    limits = LLParserLimits(step_lexer_fuel=300, verbose_errors=False)
    matcher = LLMatcher(compiler._ll_tokenizer(), form, log_level=0, limits=limits)
    quiet = service.tokens(prompts[3])
    with service.held():
        _, answer = service.ask(
            prompts[4], constraint=GrammarMatcher(matcher, NUM_TOKENS), max_tokens=40, temperature=1.0
        )
        _, beside = service.ask(prompts[3])
    error = answer.collect()[-1].error
    assert error is not None
    assert (error.code, error.status) == ("grammar_too_complex", 400)
    assert beside.tokens() == quiet
