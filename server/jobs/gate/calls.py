"""Held-out chats with tools, asked again as the server asks: the served prompt, the grammar of calls, greedy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters_store.dialects.catalog import DIALECTS, dialect_of
from adapters_store.dialects.dialect import Dialect
from adapters_store.dialects.reasoning import reasoning_of
from server.engine.grammar.compiler import AskedGrammar, GrammarCompiler, compiler_for
from server.engine.grammar.spec import GrammarSpec
from server.engine.request import InvalidRequest, SamplingParams, TokenConstraint
from server.engine.text.answer_plan import answer_form, marker_ids
from server.engine.text.answer_reader import AnswerForm, AnswerReader, Piece
from server.engine.text.call_grammar import CallsPart, ReasoningPart, answer_grammar
from server.engine.text.chat_options import ChatOptions
from server.engine.text.output import OutputState
from server.engine.text.tokenizer import Tokenizer
from server.jobs.gate.serving_scorer import ServingScorer
from trainer.data.jsonl import records_at
from trainer.data.records import Message, Record
from trainer.data.types import EncodedExample
from trainer.gate.answers.calls import CallScores

MAX_ANSWERS, MAX_CALL_TOKENS = 32, 256
_TENANT = "gate"
Calls = list[tuple[str, object]]  # names and arguments


@dataclass(frozen=True)
class _Case:
    """One answer to ask for again."""

    prompt_ids: list[int]
    form: AnswerForm
    constraint: TokenConstraint
    expected: Calls


def measure_calls(
    scorer: ServingScorer,
    tokenizer: Tokenizer,
    path: Path,
    examples: Sequence[EncodedExample],
    dialect: str | None,
    *,
    template: str | None = None,
) -> CallScores | None:
    """path: the file that the examples come from. template: the adapter's own. None: no example has tools and fits."""
    own = DIALECTS[dialect] if dialect else dialect_of(template or tokenizer.chat_template)
    compiler = compiler_for(tokenizer, tokenizer.vocabulary(scorer.base.num_embeddings))
    cases: list[_Case] = []
    try:
        for record in records_at(path, {example.line for example in examples}):
            if record.tools and len(cases) < MAX_ANSWERS:
                cases.append(_case(tokenizer, compiler, own, template, record))
    except InvalidRequest as error:
        return CallScores(0, 0.0, 0.0, 0.0, refused=error.message)
    finally:
        compiler.close()
    cases = [case for case in cases if len(case.prompt_ids) + MAX_CALL_TOKENS <= scorer.max_tokens]
    return _scored(scorer, tokenizer, cases) if cases else None


def _case(
    tokenizer: Tokenizer, compiler: GrammarCompiler, dialect: Dialect, template: str | None, record: Record
) -> _Case:
    """Of the record's last learned answer. Raises InvalidRequest for tools that the server refuses."""
    last = max(index for index, message in enumerate(record.messages) if message.weight)
    messages = [message.rendered_from() for message in record.messages[:last]]
    ids = tokenizer.encode_chat(messages, ChatOptions(tools=record.tools, dialect=dialect, template=template))
    form = answer_form(tokenizer, ids, dialect, reasoning_of(template or tokenizer.chat_template))
    marks = form.reasoning
    lark = answer_grammar(
        marker_ids(tokenizer, dialect, marks),
        reasoning=None if marks is None else ReasoningPart(marks=marks, is_open=form.starts_in_reasoning),
        calls=CallsPart(dialect=dialect, tools=record.tools, choice="auto"),
    )
    grammar = compiler.compiled(_TENANT, AskedGrammar("tools", GrammarSpec("lark", lark)))
    return _Case(ids, form, grammar.start(tokenizer.chat_end_ids), _expected(record.messages[last]))


def _expected(message: Message) -> Calls:
    return [(call.name, json.loads(call.arguments)) for call in message.calls]


def _scored(scorer: ServingScorer, tokenizer: Tokenizer, cases: Sequence[_Case]) -> CallScores:
    outputs = scorer.generate(
        [case.prompt_ids for case in cases],
        max_new_tokens=MAX_CALL_TOKENS,
        eos_ids=tokenizer.chat_end_ids,
        constraints=[case.constraint for case in cases],
    )
    answers = [_read(tokenizer, case, ids) for case, ids in zip(cases, outputs, strict=True)]
    pairs = [(case.expected, calls) for case, calls in zip(cases, answers, strict=True)]
    named = [calls is not None and [name for name, _ in calls] == [name for name, _ in want] for want, calls in pairs]
    return CallScores(
        num_answers=len(cases),
        valid=sum(calls is not None for calls in answers) / len(cases),
        named=sum(named) / len(cases),
        equal=sum(calls == want for want, calls in pairs) / len(cases),
    )


def _read(tokenizer: Tokenizer, case: _Case, ids: Sequence[int]) -> Calls | None:
    """The answer's calls; None for an answer that was cut."""
    if len(ids) >= MAX_CALL_TOKENS:
        return None
    params = SamplingParams(max_tokens=MAX_CALL_TOKENS, mark_ids=case.form.mark_ids)
    output = OutputState(params, tokenizer.token_texts, tokenizer.chat_end_ids, case.prompt_ids)
    reader, pieces = AnswerReader(case.form), list[Piece]()
    for id_ in ids:
        delta = output.append(id_)
        pieces += reader.feed(delta.text, delta.marks)
    last = output.finish("stop")
    pieces += reader.feed(last.text, last.marks) + reader.finish()
    names = {piece.number: piece.text for piece in pieces if piece.kind == "name"}
    texts = dict.fromkeys(names, "")
    for piece in pieces:
        if piece.kind == "arguments":
            texts[piece.number] += piece.text
    return [(names[number], json.loads(texts[number])) for number in sorted(names)]
