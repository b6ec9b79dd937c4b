"""Guesses of the simulated worlds: mostly the tokens that come, sometimes others. Knows what every request will say."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from adapters_store.base.description import AdapterDigest
from server.engine.request import Request
from server.engine.scheduling.block_pool import BlockPool
from server.engine.scheduling.prompt_lookup import PromptLookup
from support.worlds.fake_chain import NAN, expected_output
from support.worlds.world_grammars import drawn

_WRONG = 0.15  # of the guessed tokens


class WorldDrafts(PromptLookup):
    """Only the guesses are its own: where they go, and how many there may be, is the product's decision."""

    def __init__(
        self, most: int, pool: BlockPool, tags: Mapping[AdapterDigest, int], seed: int, switches: Sequence[int]
    ) -> None:
        super().__init__(most, pool)
        self._tags, self._random, self._switches = tags, random.Random(seed), switches
        self._never: set[str] = set()
        self._last: dict[str, int] = {}
        self.num_right = 0

    def guess(self, request: Request, most: int) -> list[int]:
        num_output = len(request.output_ids)
        if self._last.get(request.id) == num_output:  # its forward gave no token
            self._never.add(request.id)
        if request.id in self._never or self._random.random() < 0.3:
            return []
        weight = 7 if request.adapter is None else self._tags[request.adapter]
        coming = expected_output(request, weight, self._switches)[num_output:][: self._random.randint(1, most)]
        self._last[request.id] = num_output
        return [self._random.randrange(90) if self._random.random() < _WRONG else token for token in coming]

    def forget(self, request: Request) -> None:
        super().forget(request)
        self._never.discard(request.id)
        self._last.pop(request.id, None)


def right_ones(draft: Sequence[int], states: Sequence[int]) -> list[int]:
    """What is drawn from the first state, and from each behind it as long as the draft foresaw the token before."""
    tokens = [drawn(states[0], None, [])]
    for guess, state in zip(draft, states[1:], strict=True):
        if guess != tokens[-1] or state == NAN:
            break
        tokens.append(drawn(state, None, []))
    return tokens
