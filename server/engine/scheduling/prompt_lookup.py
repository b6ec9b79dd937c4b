"""Guesses a request's next tokens from its own prompt and answer (prompt lookup, also called n-gram speculation), else
from its tenant's earlier answers of the same adapter. Knows tokens and free blocks; knows no queue, no clock and no
tensors.

A guessed token costs a part of a forward, on a CPU up to a third of one, and a right one saves one. Each is kept if it
is what would have been drawn without it, by the same random number. So a guess may save a forward, and never changes a
token. A request sees what the prefix cache may give it, and nothing else comes up in its guesses: its own tokens, and
its tenant's if that cache is on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters_store.base.description import AdapterDigest
from server.engine.request import Request
from server.engine.schedule import Schedule
from server.engine.scheduling.block_pool import BlockPool
from server.engine.scheduling.phrases import Phrases

MATCH = 3  # the guess is what followed the last three tokens when they came before
MOST_INDEXED = 8192  # tokens of a prompt's end: indexing 8,192 takes some 3 ms
FIRST = 2  # tokens of the first draft: few are lost if it is wrong
_MOST_REST = 64  # tokens
_LEFT_FREE = 8  # one block of eight stays free of drafts


@dataclass(slots=True)
class _Pace:
    """How much one source may guess for one request. limit: most tokens of the next draft. rest_until: no draft before
    the output is so long."""

    limit: int = FIRST
    num_misses: int = 0
    rest_until: int = 0

    def learn(self, length: int, num_right: int, num_output: int) -> None:
        """Longer drafts after one that was right, none for a while after one that was wrong from its first token."""
        if num_right == 0:
            self.num_misses += 1
            self.limit = 1
            self.rest_until = num_output + min(_MOST_REST, 4 ** (self.num_misses - 1) - 1)
        else:
            self.num_misses = 0
            self.limit = 2 * length if num_right == length else num_right


@dataclass(slots=True)
class _Guesser:
    """Of one request. num_indexed: the position from which runs of MATCH tokens are not in `ends` yet. ends: the
    position behind the last occurrence of each.

    own, phrases: how much its own text may guess, and earlier answers. last: lengths of the output and of the draft
    when it last guessed, and the pace of that source.
    """

    num_indexed: int
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    own: _Pace = field(default_factory=_Pace)
    phrases: _Pace = field(default_factory=_Pace)
    is_over: bool = False
    last: tuple[int, int, _Pace] | None = None

    def learn(self, num_output: int) -> None:
        """How many tokens of the last draft were right. No draft ever again after one whose forward gave the request no
        token."""
        if self.last is None:
            return
        (before, length, pace), self.last = self.last, None
        num_right = num_output - before - 1
        if num_right < 0:
            self.is_over = True
        else:
            pace.learn(length, num_right, num_output)

    def index(self, request: Request) -> None:
        """All runs but the last, which is what the guess looks for."""
        tokens = request.tokens(self.num_indexed, request.num_tokens - 1)
        for end in range(MATCH, len(tokens) + 1):
            self.ends[tuple(tokens[end - MATCH : end])] = self.num_indexed + end
        self.num_indexed += max(0, len(tokens) - MATCH + 1)

    def guess(self, request: Request, most: int) -> list[int]:
        """What followed the request's last tokens when they stood there before; continues with the guess itself."""
        num_tokens = request.num_tokens
        place = self.ends.get(tuple(request.tokens(num_tokens - MATCH, num_tokens)))
        if place is None:
            return []
        draft = request.tokens(place, min(place + most, num_tokens))
        while len(draft) < most:
            draft.append(draft[place + len(draft) - num_tokens])
        return draft


class PromptLookup:
    """One per scheduler. most: tokens that it adds to a forward of one row; each further row leaves one less."""

    def __init__(self, most: int, pool: BlockPool) -> None:
        self.most = most
        self._pool = pool
        self._guessers: dict[str, _Guesser] = {}
        self.phrases = Phrases() if most and pool.settings.enable_prefix_cache else None

    def add_drafts(self, schedule: Schedule) -> None:
        """Give decode rows a draft, the first admitted first, if the forward has no prompt and few rows. Allocates the
        blocks for it, and takes none that running requests need soon."""
        room = self.most + 1 - schedule.num_tokens
        if room <= 0 or schedule.num_decodes < len(schedule.rows):
            return
        for row in schedule.rows:
            draft = self._draft(row.request, room)
            if draft:
                row.draft = draft
                row.num_tokens += len(draft)
                room -= len(draft)
                schedule.num_tokens += len(draft)
                schedule.num_decodes -= 1
        schedule.rows.sort(key=lambda row: bool(row.draft))

    def forget(self, request: Request) -> None:
        """The request is over."""
        self._guessers.pop(request.id, None)
        if self.phrases is not None:
            self.phrases.learn(request)

    def forget_adapter(self, digest: AdapterDigest) -> None:
        """The adapter left service."""
        if self.phrases is not None:
            self.phrases.forget_adapter(digest)

    def guess(self, request: Request, most: int) -> list[int]:
        """At most `most` tokens that may follow the request's last one; empty: it has no idea."""
        guesser = self._guessers.get(request.id)
        if guesser is None:
            guesser = _Guesser(max(0, len(request.prompt_ids) - MOST_INDEXED))
            self._guessers[request.id] = guesser
        num_output = len(request.output_ids)
        guesser.learn(num_output)
        if guesser.is_over or request.num_tokens <= MATCH:
            return []
        draft: list[int] = []
        pace = guesser.own
        if num_output >= pace.rest_until:
            guesser.index(request)
            draft = guesser.guess(request, min(most, pace.limit))
        if not draft and self.phrases is not None and num_output >= guesser.phrases.rest_until:
            pace = guesser.phrases
            draft = self.phrases.draft(request, min(most, pace.limit))
        if draft:
            guesser.last = num_output, len(draft), pace
        return draft

    def _draft(self, request: Request, room: int) -> list[int]:
        if not is_guessable(request):
            return []
        num_last = request.params.max_tokens - len(request.output_ids) - 1
        most = min(room, num_last, self._room_in_blocks(request), self._before_switch(request))
        if most < 1:
            return []
        draft = self.guess(request, most)
        num_missing = self._pool.blocks_for(request.num_tokens + len(draft)) - len(request.block_ids)
        if num_missing > 0:
            request.block_ids += self._pool.allocate(num_missing)
        return draft

    def _room_in_blocks(self, request: Request) -> int:
        """Tokens behind the request's last one, in its own blocks and in those that nothing will want soon."""
        num_spare = max(0, self._pool.num_free - -(-self._pool.num_blocks // _LEFT_FREE))
        return (len(request.block_ids) + num_spare) * self._pool.block_size - request.num_tokens

    def _before_switch(self, request: Request) -> int:
        """Tokens until the sequence outgrows its keys."""
        switches = self._pool.settings.rope_switches
        return min((length - request.num_tokens for length in switches if length >= request.num_tokens), default=2**31)


def is_guessable(request: Request) -> bool:
    """Whether the request is past its prompt, and its draws depend on nothing of its output but how long it is."""
    return bool(request.output_ids) and request.constraint is None and not request.params.has_penalties
