"""One request's way through its grammar: which token may be next, and when the answer is whole.

The masks of several requests are computed in one call, which leaves the interpreter to other threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from lora_kernels.cgroups import usable_cpus
from server.engine.grammar.refusals import is_too_complex
from server.engine.request import RequestError, TokenConstraint

_MAX_THREADS = 4  # a quarter of the cores: the forward works meanwhile, and a small machine gains nothing from more


class GrammarMatcher:
    """A `TokenConstraint`. matcher: at the start of its grammar, for this request alone. vocab_size: its tokenizer's.

    banned_ends: tokens that end a sequence for llguidance but not for this request.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, banned_ends: Iterable[int] = ()) -> None:
        self._matcher = matcher
        self._mask_bytes = -(-vocab_size // 32) * 4
        self._banned_ends = [(id_ >> 3, 1 << (id_ & 7)) for id_ in banned_ends]
        self._num_read = 0
        self._failure: RequestError | None = None

    def advance(self, output_ids: Sequence[int]) -> None:
        if len(output_ids) == self._num_read:
            return
        if len(output_ids) < self._num_read:
            self._matcher.rollback(self._num_read - len(output_ids))
            self._num_read = len(output_ids)
        for token_id in output_ids[self._num_read :]:
            self._num_read += 1
            if self._failure is None and not self._matcher.consume_token(token_id):
                self._fail()

    def allowed(self) -> NDArray[np.uint8]:
        bits: NDArray[np.uint8] = allowed_of([self])[0]
        return bits

    @property
    def is_complete(self) -> bool:
        return self._failure is None and self._matcher.is_stopped()

    @property
    def failure(self) -> RequestError | None:
        return self._failure

    def _correct(self, bits: NDArray[np.uint8]) -> None:
        """In place. bits: what llguidance left, which is undefined after a failure."""
        if self._failure is None and self._matcher.is_error():
            self._fail()
        if self._failure is not None:
            bits[:] = 0xFF
        elif any(bits[byte] & bit for byte, bit in self._banned_ends):
            self._ban_ends(bits)

    def _ban_ends(self, bits: NDArray[np.uint8]) -> None:
        """The same bits if nothing else would be left: then the answer is whole, and any end ends it."""
        left = bits.copy()
        for byte, bit in self._banned_ends:
            left[byte] &= ~bit & 0xFF
        if left.any():
            bits[:] = left

    def _fail(self) -> None:
        if is_too_complex(self._matcher.get_error()):
            self._failure = RequestError("grammar_too_complex", "the grammar needs too much work for one token", 400)
        else:
            message = f"the grammar allows no token of this model after {self._num_read} tokens"
            self._failure = RequestError("grammar_dead_end", message, 400)


def allowed_of(constraints: Sequence[TokenConstraint]) -> NDArray[np.uint8]:
    """A `MaskSource`. All are GrammarMatchers of one base. Several are computed on threads of llguidance's own."""
    matchers = [each for each in constraints if isinstance(each, GrammarMatcher)]
    assert len(matchers) == len(constraints), "a constraint of another kind"
    masks = np.zeros((len(matchers), matchers[0]._mask_bytes), np.uint8)
    jobs = [(each._matcher, row) for row, each in enumerate(matchers) if each.failure is None]
    if len(jobs) > 1:
        _executor().unsafe_compute_mask_ptr(jobs, masks.ctypes.data, masks.shape[1], len(masks))
    elif jobs:
        [(matcher, row)] = jobs
        matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks.shape[1])
    for each, bits in zip(matchers, masks, strict=True):
        each._correct(bits)
    return masks


@cache
def _executor() -> LLExecutor:
    return LLExecutor(max(1, min(_MAX_THREADS, usable_cpus() // 4)))
