"""A process that compiles grammars from outside first: some make the compiler overflow its stack or never return.

    python -P -m server.engine.grammar.checker FD

FD: a `multiprocessing` connection. The first message is the token table, then one JSON text for each grammar, answered
by one each. The process is killed by its parent after the time limit, and ends when its parent does.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from server.engine.grammar.refusals import NO_TEXT, TOO_MUCH, Refusal, is_too_complex, refusal_of
from server.engine.grammar.spec import GrammarSpec, TooComplex, UnreadableGrammar
from server.engine.grammar.tokens import LIMITS, TokenTable

STACK_BYTES = 1 << 20  # less than any thread of the server has: what compiles here compiles there
_MORE_MEMORY_BYTES = 1 << 30
_NUM_STEPS = 16  # tokens of a random answer
_NICE = 10


def check(spec: GrammarSpec, tokenizer: LLTokenizer) -> str | Refusal:
    """The compiled form of a grammar that some text can begin to follow, or why it is refused."""
    try:
        form = spec.compiled_form()
    except UnreadableGrammar as error:
        return Refusal("invalid_grammar", f"is {error}")
    except TooComplex as error:
        return Refusal("grammar_too_complex", str(error))
    matcher = LLMatcher(tokenizer, form, log_level=0, limits=LIMITS)
    if matcher.is_error():
        return refusal_of(matcher.get_error())
    unimplemented = [refusal_of(warning) for warning in matcher.get_grammar_warnings() if "Unimplemented" in warning]
    return unimplemented[0] if unimplemented else _walked(matcher) or form


def _walked(matcher: LLMatcher) -> Refusal | None:
    """The first tokens of a random answer: what they need must be within the limits of a step."""
    choose = random.Random(0)
    for step in range(_NUM_STEPS):
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits)
        if matcher.is_error():
            return TOO_MUCH if is_too_complex(matcher.get_error()) else NO_TEXT
        if not len(allowed):
            return NO_TEXT if step == 0 else None
        matcher.consume_token(int(choose.choice(allowed.tolist())))
        if matcher.is_stopped():
            break
    return None


def _answer(request: bytes, tokenizer: LLTokenizer) -> dict[str, Any]:
    result = check(GrammarSpec(**json.loads(request)), tokenizer)
    return {"refusal": [result.code, result.message]} if isinstance(result, Refusal) else {"form": result}


def _serve(connection: Connection) -> None:
    tokenizer = TokenTable.from_json(connection.recv_bytes().decode()).tokenizer()
    _limit_memory()
    connection.send_bytes(b"ready")
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(json.dumps(_answer(request, tokenizer)).encode())


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MORE_MEMORY_BYTES,) * 2)


def main() -> None:
    os.nice(_NICE)
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=_serve, args=(Connection(int(sys.argv[1])),))
    worker.start()
    worker.join()


if __name__ == "__main__":
    main()
