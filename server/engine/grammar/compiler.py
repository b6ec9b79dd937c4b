"""Compiles grammars: checked in a process of its own, within limits, then kept for the tenant that sent them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from llguidance import LLMatcher, LLTokenizer

from server.engine.grammar.check_pool import CheckPool
from server.engine.grammar.matcher import GrammarMatcher
from server.engine.grammar.refusals import CRASHED, TIMED_OUT, Refusal
from server.engine.grammar.spec import MAX_GRAMMAR_BYTES, GrammarSpec
from server.engine.grammar.tokens import LIMITS, Encode, TokenTable
from server.engine.request import InvalidRequest, check_unicode
from server.engine.text.tokenizer import Tokenizer
from server.engine.text.vocabulary import Vocabulary

_MAX_KEPT, _MAX_KEPT_OF_TENANT = 512, 64
_KEPT_BYTES = 8 << 20

_NO_END = b"<|no end|>"

_Key = tuple[str, GrammarSpec]


def compiler_for(tokenizer: Tokenizer, vocabulary: Vocabulary) -> GrammarCompiler:
    """For a base with this tokenizer, of whose ids `vocabulary` is served. Starts nothing."""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    return GrammarCompiler(partial(token_table, tokenizer, vocabulary), encode)


def token_table(tokenizer: Tokenizer, vocabulary: Vocabulary) -> TokenTable:
    texts, size = tokenizer.token_texts, vocabulary.size
    tokens = [b"" if id_ in vocabulary.holes else texts.token_bytes(id_) for id_ in range(size)]
    special_ids = [id_ for id_ in tokenizer.marker_ids if id_ < size]
    ending_ids = sorted(id_ for id_ in tokenizer.chat_end_ids if id_ < size)
    if not ending_ids:  # llguidance needs one: an id that is never served
        tokens.append(_NO_END)
        special_ids.append(size)
        ending_ids.append(size)
    return TokenTable(tuple(tokens), tuple(special_ids), tuple(ending_ids))


class AskedGrammar(NamedTuple):
    """field: of the request's body, for messages."""

    field: str
    spec: GrammarSpec


class CompiledGrammar:
    """A grammar at its start. Any thread may start requests from it."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, ending_ids: Iterable[int]) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._ending_ids = frozenset(ending_ids)

    def start(self, ending_ids: Iterable[int]) -> GrammarMatcher:
        """For one request. ending_ids: tokens that may end its answer."""
        return GrammarMatcher(self._matcher.deep_copy(), self._vocab_size, self._ending_ids.difference(ending_ids))


class GrammarCompiler:
    """One for each base. Any thread may use it; `compiled` may take `check_pool.TIME_LIMIT_S`, `known` does not wait.

    A tenant's grammars are kept for this tenant alone: another's compile times say nothing of them.
    """

    def __init__(self, make_table: Callable[[], TokenTable], encode: Encode | None = None) -> None:
        self._make_table, self._encode = make_table, encode
        self._pool = CheckPool(self._table)
        self._lock, self._table_lock = threading.Lock(), threading.RLock()
        self._known_table: TokenTable | None = None
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[_Key, CompiledGrammar | Refusal] = OrderedDict()
        self._running: dict[_Key, Future[CompiledGrammar | Refusal]] = {}

    def known(self, tenant: str, asked: AskedGrammar) -> CompiledGrammar | None:
        """The grammar, if the tenant has sent it lately. Raises InvalidRequest if it was refused then."""
        with self._lock:
            found = self._kept_last((tenant, asked.spec))
        return None if found is None else _accepted(found, asked.field)

    def compiled(self, tenant: str, asked: AskedGrammar) -> CompiledGrammar:
        """Raises InvalidRequest for the field; its message quotes nothing of the grammar."""
        _check_text(asked)
        return _accepted(self._compiled_once((tenant, asked.spec)), asked.field)

    def close(self) -> None:
        self._pool.close()

    def _compiled_once(self, key: _Key) -> CompiledGrammar | Refusal:
        """By the first thread that asks; those that ask meanwhile wait for its result."""
        with self._lock:
            found = self._kept_last(key)
            if found is not None:
                return found
            others = self._running.get(key)
            if others is None:
                own = self._running[key] = Future[CompiledGrammar | Refusal]()
        if others is not None:
            return others.result()
        try:
            result = self._pool.check(*key)
            compiled = result if isinstance(result, Refusal) else self._compile(result)
            self._keep(key, compiled)
            own.set_result(compiled)
        except BaseException as error:
            own.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._running[key]
        return compiled

    def _kept_last(self, key: _Key) -> CompiledGrammar | Refusal | None:
        """Call it with the lock held."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def _compile(self, form: str) -> CompiledGrammar:
        matcher = LLMatcher(self._ll_tokenizer(), form, log_level=0, limits=LIMITS)
        matcher.compute_bitmask()  # what the lexer learns is shared by all copies
        assert not matcher.is_error(), "compiled in the checker's process and not here"
        return CompiledGrammar(matcher, len(self._table().tokens), self._table().ending_ids)

    def _table(self) -> TokenTable:
        with self._table_lock:
            if self._known_table is None:
                self._known_table = self._make_table()
            return self._known_table

    def _ll_tokenizer(self) -> LLTokenizer:
        with self._table_lock:
            if self._tokenizer is None:
                self._tokenizer = self._table().tokenizer(self._encode)
            return self._tokenizer

    def _keep(self, key: _Key, compiled: CompiledGrammar | Refusal) -> None:
        if compiled in (CRASHED, TIMED_OUT):
            return  # the machine may have been busy
        with self._lock:
            self._kept[key] = compiled
            own = [kept for kept in self._kept if kept[0] == key[0]]
            if len(own) > _MAX_KEPT_OF_TENANT:
                del self._kept[own[0]]
            while len(self._kept) > _MAX_KEPT or self._num_bytes > _KEPT_BYTES:
                self._kept.popitem(last=False)

    @property
    def _num_bytes(self) -> int:
        return sum(len(spec.text) for _, spec in self._kept)


def _check_text(asked: AskedGrammar) -> None:
    num_bytes = len(check_unicode(asked.field, asked.spec.text))
    if num_bytes > MAX_GRAMMAR_BYTES:
        message = f"{asked.field}: a grammar must have at most {MAX_GRAMMAR_BYTES} bytes, got {num_bytes}"
        raise InvalidRequest(asked.field, message, code="grammar_too_complex")


def _accepted(compiled: CompiledGrammar | Refusal, field: str) -> CompiledGrammar:
    if isinstance(compiled, Refusal):
        raise InvalidRequest(field, f"{field} {compiled.message}", code=compiled.code)
    return compiled
