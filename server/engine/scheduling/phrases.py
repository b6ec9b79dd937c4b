"""Remembers which token followed which in earlier answers, separately for each tenant and adapter. Knows tokens; knows
no forward and no blocks.

An adapter answers in its tenant's phrases, so what it said in one answer foretells much of the next. A set is separate
as the prefix cache's blocks are: one tenant's requests, with one adapter. A hint that is wrong changes no token.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from adapters_store.base.description import AdapterDigest
from server.engine.request import Request

LONG, SHORT = 6, 3  # tokens of a run that has to be seen once, and of one that has to be seen twice
MOST_ENTRIES = 131_072  # two for each token of an answer; 131,072 take some 25 MB
MOST_OF_ONE = MOST_ENTRIES // 4

_Run = tuple[int, ...]
_Set = dict[_Run, int]  # the token behind each run, the oldest run first; ~token: a short run's, seen once


class Phrases:
    """What was said lately. most_of_one: entries of one tenant and adapter; both limits count runs."""

    def __init__(self, most: int = MOST_ENTRIES, most_of_one: int = MOST_OF_ONE) -> None:
        self._most, self._most_of_one = most, most_of_one
        self._sets: OrderedDict[tuple[str, AdapterDigest | None], _Set] = OrderedDict()  # least lately learned first
        self._num_entries = 0

    def __len__(self) -> int:
        return self._num_entries

    def learn(self, request: Request) -> None:
        """The request is over: remember its answer."""
        if not request.output_ids:
            return
        key = request.cache_salt, request.adapter
        known = self._sets.pop(key, {})
        self._num_entries -= len(known)
        tokens = tuple(request.tokens(max(0, len(request.prompt_ids) - LONG), request.num_tokens))
        for end in range(max(SHORT, len(tokens) - len(request.output_ids)), len(tokens)):
            token, run = tokens[end], tokens[end - SHORT : end]
            before = known.get(run)
            if before != token:
                known[run] = token if before == ~token else ~token
            if end >= LONG:
                known[tokens[end - LONG : end]] = token
        self._keep(key, known)

    def draft(self, request: Request, most: int) -> list[int]:
        """At most `most` tokens that followed the request's last ones in earlier answers."""
        known = self._sets.get((request.cache_salt, request.adapter))
        if known is None:
            return []
        num_tokens = request.num_tokens
        tokens = request.tokens(max(0, num_tokens - LONG), num_tokens)
        num_given = len(tokens)
        while len(tokens) < num_given + most:
            token = known.get(tuple(tokens[-LONG:]))
            if token is None:
                token = known.get(tuple(tokens[-SHORT:]))
            if token is None or token < 0:
                break
            tokens.append(token)
        return tokens[num_given:]

    def forget_adapter(self, digest: AdapterDigest) -> None:
        """The adapter left service."""
        for key in [key for key in self._sets if key[1] == digest]:
            self._num_entries -= len(self._sets.pop(key))

    def _keep(self, key: tuple[str, AdapterDigest | None], known: _Set) -> None:
        """As the latest set; the oldest runs and sets make room for it."""
        for run in list(islice(known, max(0, len(known) - self._most_of_one))):
            del known[run]
        self._sets[key] = known
        self._num_entries += len(known)
        while self._num_entries > self._most:
            self._num_entries -= len(self._sets.popitem(last=False)[1])
