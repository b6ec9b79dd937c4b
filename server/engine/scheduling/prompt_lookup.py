"""Guesses the tokens that a request says next, from what stands in its prompt and answer already (prompt lookup, as
n-gram speculation is also called). Knows tokens and free blocks; knows no queue, no clock and no tensors.

A guessed token costs a part of a forward, on a CPU up to a third of one, and a right one saves one. Each is kept if it
is what would have been drawn without it, by the same random number. So a guess may save a forward, and never changes a
token. A request looks at its own tokens alone: nothing of another's can come up in its guesses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.request import Request
from server.engine.schedule import Schedule, ScheduledRow
from server.engine.scheduling.block_pool import BlockPool

MATCH = 3  # tokens that must stand there already: what followed them is the guess
MOST_INDEXED = 8192  # tokens of a prompt's end: indexing 8,192 takes some 3 ms
FIRST = 2  # tokens of the first draft: few are lost if it is wrong
_MOST_REST = 64  # tokens
_LEFT_FREE = 8  # one block of eight stays free of drafts


@dataclass(slots=True)
class _Guesser:
    """Of one request. num_indexed: the position from which runs of MATCH tokens are not in `ends` yet. ends: the
    position behind the last occurrence of each.

    limit: most tokens of the next draft. rest_until: no draft before the output is so long. last: lengths of the output
    and of the draft when it last guessed.
    """

    num_indexed: int
    limit: int
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_misses: int = 0
    rest_until: int = 0
    last: tuple[int, int] | None = None

    def learn(self, num_output: int) -> None:
        """How many tokens of the last draft were right: longer drafts after one that was right, none for a while after
        one that was wrong from its first token, none ever again after one whose forward gave the request no token."""
        if self.last is None:
            return
        (before, length), self.last = self.last, None
        num_right = num_output - before - 1
        if num_right < 0:
            self.rest_until = 2**62
        elif num_right == 0:
            self.num_misses += 1
            self.limit = 1
            self.rest_until = num_output + min(_MOST_REST, 4**self.num_misses)
        else:
            self.num_misses = 0
            self.limit = 2 * length if num_right == length else num_right

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
        schedule.rows.sort(key=_has_draft)

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._guessers.pop(request_id, None)

    def guess(self, request: Request, most: int) -> list[int]:
        """At most `most` tokens that may follow the request's last one; empty: it has no idea."""
        guesser = self._guessers.get(request.id)
        if guesser is None:
            guesser = _Guesser(max(0, len(request.prompt_ids) - MOST_INDEXED), limit=FIRST)
            self._guessers[request.id] = guesser
        guesser.learn(len(request.output_ids))
        if len(request.output_ids) < guesser.rest_until or request.num_tokens <= MATCH:
            return []
        guesser.index(request)
        draft = guesser.guess(request, min(most, guesser.limit))
        if draft:
            guesser.last = len(request.output_ids), len(draft)
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


def _has_draft(row: ScheduledRow) -> bool:
    return bool(row.draft)
