"""One request's way through its grammar: which token may be next, and when the answer is whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from server.engine.constraint import ConstraintFailure
from server.engine.grammar.refusals import is_too_complex


class GrammarMatcher:
    """A `TokenConstraint`. matcher: at the start of its grammar, for this request alone.

    banned_ends: tokens that end a sequence for llguidance but not for this request.
    """

    def __init__(self, matcher: LLMatcher, banned_ends: Iterable[int] = ()) -> None:
        self._matcher = matcher
        self._banned_ends = np.array(sorted(banned_ends), dtype=np.int64)
        self._num_read = 0
        self._failure: ConstraintFailure | None = None

    def advance(self, output_ids: Sequence[int]) -> None:
        if len(output_ids) < self._num_read:
            self._matcher.rollback(self._num_read - len(output_ids))
            self._num_read = len(output_ids)
        for token_id in output_ids[self._num_read :]:
            self._num_read += 1
            if self._failure is None and not self._matcher.consume_token(token_id):
                self._fail()

    def allowed(self) -> NDArray[np.uint8]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._failure is None and self._matcher.is_error():
            self._fail()
        if self._failure is not None:
            return np.full_like(bits, 0xFF)
        return self._without_banned_ends(bits) if len(self._banned_ends) else bits

    def forced(self) -> list[int]:
        return [] if self._failure is not None else list(self._matcher.compute_ff_tokens())

    @property
    def is_complete(self) -> bool:
        return self._failure is None and self._matcher.is_stopped()

    @property
    def failure(self) -> ConstraintFailure | None:
        return self._failure

    def _without_banned_ends(self, bits: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The same bits if nothing else would be left: then the answer is whole, and any end ends it."""
        left = bits.copy()
        np.bitwise_and.at(left, self._banned_ends >> 3, ~(1 << (self._banned_ends & 7)).astype(np.uint8))
        return left if left.any() else bits

    def _fail(self) -> None:
        if is_too_complex(self._matcher.get_error()):
            self._failure = ConstraintFailure("grammar_too_complex", "the grammar needs too much work for one token")
        else:
            message = f"the grammar allows no token of this model after {self._num_read} tokens"
            self._failure = ConstraintFailure("grammar_dead_end", message)
