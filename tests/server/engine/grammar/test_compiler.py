"""Grammars from outside: served, or refused by a reason that quotes nothing; none ends the process or holds it up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from server.engine.grammar import compiler as compiler_module
from server.engine.grammar.compiler import AskedGrammar, CompiledGrammar, GrammarCompiler, compiler_for
from server.engine.grammar.spec import MAX_GRAMMAR_BYTES, GrammarSpec
from server.engine.request import InvalidRequest
from server.engine.text.tokenizer import Tokenizer

Compile = Callable[..., CompiledGrammar]
LONG_CHAIN = "\n".join(["start: a0", *(f"a{i}: a{i + 1}" for i in range(3000)), 'a3000: "x"'])
DOUBLING = "\n".join(["start: A0", *(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)), 'A40: "x"'])


def asked(spec: GrammarSpec) -> AskedGrammar:
    return AskedGrammar("response_format", spec)


def nested(depth: int) -> str:
    return '{"properties":{"secret":' * depth + "{}" + "}}" * depth


IDLE = {  # they forbid nothing
    "uniqueItems": False,
    "propertyNames": {"type": "string"},
    "unevaluatedProperties": True,
    "unevaluatedItems": {},
    "dependentRequired": {},
    "dependentSchemas": {},
    "dependencies": {},
    "not": False,
}
REFUSED = {
    "keyword": ("json_schema", '{"type":"array","uniqueItems":true}', "unsupported_grammar", "uniqueItems"),
    "two keywords": ("json_schema", '{"not":{},"propertyNames":{}}', "unsupported_grammar", "not, propertyNames"),
    "format": ("json_schema", '{"type":"string","format":"secret"}', "unsupported_grammar", "format"),
    "type": ("json_schema", '{"type":"secret"}', "invalid_grammar", "type"),
    "remote": ("json_schema", '{"$ref":"http://secret.example/x.json"}', "invalid_grammar", "$ref"),
    "no pointer": ("json_schema", '{"$ref":"#/$defs/secret"}', "invalid_grammar", "$ref"),
    "not an object": ("json_schema", '"secret"', "invalid_grammar", ""),
    "not JSON": ("json_schema", "{secret", "invalid_grammar", "not a JSON schema"),
    "look-ahead": ("regex", "(?=secret)b", "unsupported_grammar", "look-around"),
    "no regex": ("regex", "secret(((", "invalid_grammar", "regular expression"),
    "no grammar": ("grammar", "secret secret", "invalid_grammar", "neither Lark nor GBNF"),
    "unknown rule": ("grammar", "start: secret", "invalid_grammar", ""),
    "reference loop": ("json_schema", '{"$ref":"#"}', "invalid_grammar", "allows no text"),
    "rule loop": ("grammar", "start: a\na: a", "invalid_grammar", "allows no text"),
    "contradiction": ("json_schema", '{"type":"integer","minimum":5,"maximum":4}', "invalid_grammar", ""),
    "depth 200": ("json_schema", nested(100), "grammar_too_complex", "nests too deeply: 201 levels, at most 124"),
    "depth 125": ("json_schema", '{"items":' * 124 + "{}" + "}" * 124, "grammar_too_complex", "125 levels"),
    "depth 500": ("json_schema", '{"anyOf":[' * 250 + '"]}{["' + "]}" * 250, "grammar_too_complex", "500 levels"),
    "depth 1000": ("json_schema", nested(1000), "grammar_too_complex", "nests too deeply"),
    "brackets": ("regex", "(" * 1000 + "secret" + ")" * 1000, "grammar_too_complex", "nests too deeply"),
    "lark depth": ("grammar", "start: " + "(" * 5000 + '"x"' + ")" * 5000, "grammar_too_complex", "nests too deeply"),
    "brackets 251": ("regex", "(" * 251 + ")" * 251, "grammar_too_complex", "nests too deeply: at most 250 levels"),
    "lark depth 29": ("grammar", "start: " + "(" * 29 + '"x"' + ")" * 29, "grammar_too_complex", "at most 28 levels"),
    "64 KiB": ("json_schema", '{"secret":"' + "x" * MAX_GRAMMAR_BYTES + '"}', "grammar_too_complex", "bytes"),
    "multiple": ("json_schema", '{"type":"integer","multipleOf":62615533}', "grammar_too_complex", "multipleOf"),
    "int64": ("json_schema", f'{{"type":"integer","minimum":{-(2**63)}}}', "unsupported_grammar", "minimum"),
    "overflow of the stack": ("grammar", LONG_CHAIN, "grammar_too_complex", ""),
}  # fmt: skip
SERVED = {
    "nested quantifiers": ("regex", "((((a{1,100}){1,100}){1,100}){1,100})"),
    "exponential automaton": ("regex", "[ab]*a[ab]{20}"),
    "as deep as may be": ("json_schema", '{"items":' * 123 + "{}" + "}" * 123),
    "regex 250 deep": ("regex", "(" * 250 + "x" + ")" * 250),
    "lark 28 deep": ("grammar", "start: " + "(" * 28 + '"x"' + ")" * 28),
    "brackets in strings": ("json_schema", json.dumps({"enum": ['\\"' + "[{" * 200]})),
    "idle keywords": ("json_schema", json.dumps({"type": ["array", "object"], **IDLE, "items": IDLE})),
    "alternatives": ("regex", "(a|a)*(b|b)*" * 200),
    "wide": ("json_schema", json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(200)}})),
    "long enum": ("json_schema", json.dumps({"enum": ["x" * 30 + str(i) for i in range(500)]})),
    "recursion": ("json_schema", '{"type":"object","properties":{"next":{"$ref":"#"}},"additionalProperties":false}'),
    "long array": ("json_schema", '{"type":"array","minItems":100000}'),
    "ambiguous": ("grammar", 'start: a\na: a a | "x"'),
    "GBNF": ("grammar", 'root ::= "a" ("b" | [0-9]+)'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_its_reason_and_quotes_nothing(compiled: Compile, name: str) -> None:
    kind, text, code, reason = REFUSED[name]
    with pytest.raises(InvalidRequest) as refused:
        compiled(kind, text)
    assert (refused.value.code, refused.value.param) == (code, "response_format")
    assert reason in refused.value.message
    assert refused.value.message.startswith("response_format")
    assert "secret" not in refused.value.message
    assert len(refused.value.message) < 200


@pytest.mark.parametrize("name", SERVED)
def test_a_costly_grammar_within_the_limits_is_served(compiled: Compile, name: str) -> None:
    matcher = compiled(*SERVED[name]).start(())
    assert matcher.allowed().any()
    assert matcher.failure is None


def test_a_grammar_without_end_is_given_up_and_other_tenants_compile_meanwhile(tokenizer: Tokenizer) -> None:
    impatient = compiler_for(tokenizer, tokenizer.vocabulary(tokenizer.vocab_size))
    small = GrammarSpec("regex", "[0-9]{4}")
    impatient.compiled("globex", asked(small))  # its process has started
    outcome: list[str] = []

    def ask() -> None:
        try:
            impatient.compiled("acme", asked(GrammarSpec("grammar", DOUBLING)))
        except InvalidRequest as error:
            outcome.append(error.code)

    hostile = threading.Thread(target=ask)
    hostile.start()
    num_served = 0
    while hostile.is_alive():
        impatient.compiled(f"tenant{num_served}", asked(small))
        num_served += 1
    hostile.join()
    assert outcome == ["grammar_too_complex"]
    assert num_served >= 3
    impatient.close()


def test_the_python_of_other_threads_runs_while_a_grammar_compiles(compiled: Compile) -> None:
    """What runs in this process beside the check holds no lock of the interpreter for long."""
    text = json.dumps({"properties": {f"q{i}": {"type": "string", "maxLength": 9} for i in range(150)}})
    done, beats = threading.Event(), 0

    def compile_it() -> None:
        compiled("json_schema", text)
        done.set()

    thread = threading.Thread(target=compile_it)
    thread.start()
    while not done.is_set():
        time.sleep(0)
        beats += 1
    thread.join()
    assert beats > 50


def test_what_a_tenant_sent_is_kept_for_this_tenant_alone(compiler: GrammarCompiler) -> None:
    spec = GrammarSpec("regex", "kept[0-9]")
    first = compiler.compiled("acme", asked(spec))
    assert compiler.known("acme", asked(spec)) is first
    assert compiler.known("globex", asked(spec)) is None
    assert compiler.compiled("globex", asked(spec)) is not first
    refused = GrammarSpec("regex", "(((")
    for ask in (compiler.compiled, compiler.known):
        with pytest.raises(InvalidRequest, match="other_field"):
            ask("acme", AskedGrammar("other_field", refused))


@pytest.mark.parametrize(("kind", "text"), [("regex", "once[0-9]{1,200}"), ("regex", "((("), ("grammar", DOUBLING)])
def test_equal_grammars_that_a_tenant_sends_at_once_are_compiled_once(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, kind: Any, text: str
) -> None:
    """Also those that are refused, or given up after the time limit."""
    check, specs, num_threads = compiler._pool.check, list[GrammarSpec](), 4
    monkeypatch.setattr(compiler._pool, "check", lambda tenant, spec: specs.append(spec) or check(tenant, spec))
    ready, outcomes, fields = threading.Barrier(num_threads), list[object](), list[str | None]()

    def ask(field: str) -> None:
        ready.wait()
        try:
            outcomes.append(compiler.compiled("at-once", AskedGrammar(field, GrammarSpec(kind, text))))
        except InvalidRequest as error:
            outcomes.append(error.code)
            fields.append(error.param)

    threads = [threading.Thread(target=ask, args=(f"field{number}",)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(specs) == 1
    assert len(outcomes) == num_threads
    assert len(set(outcomes)) == 1
    assert sorted(map(str, fields)) in ([], [f"field{number}" for number in range(num_threads)])


def test_an_error_of_the_compiler_itself_reaches_all_that_wait_and_is_not_kept(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, is_waited_for = GrammarSpec("regex", "broken[0-9]"), threading.Event()

    def fail(*_: object) -> None:
        is_waited_for.wait(10)
        raise OSError("no process can be started")

    def ask() -> None:
        with pytest.raises(OSError, match="no process"):
            compiler.compiled("acme", asked(spec))
        num_failed.append(1)

    num_failed: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(compiler._pool, "check", fail)
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        is_waited_for.set()
        for thread in threads:
            thread.join()
    assert len(num_failed) == 3
    assert compiler.compiled("acme", asked(spec)).start(()).allowed().any()


def test_one_tenant_cannot_drive_out_what_others_sent(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "_MAX_KEPT_OF_TENANT", 3)
    spec = GrammarSpec("regex", "[0-9]")
    compiler.compiled("quiet", asked(spec))
    own = [GrammarSpec("regex", f"flood{number}") for number in range(5)]
    for each in own:
        compiler.compiled("flood", asked(each))
    assert [compiler.known("flood", asked(each)) is not None for each in own] == [False, False, True, True, True]
    assert compiler.known("quiet", asked(spec)) is not None
