"""Remembers answers of the database until any process writes. Knows a generation number and a clock; no SQL.

A write of this process is seen at once; another process's within `max_age_s`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Answer = TypeVar("Answer")

MAX_ANSWERS = 200_000


class AnswerCache(Generic[Key, Answer]):
    """read_generation: a number that changes with every write; None: unknown now, remembered answers still count.

    Safe to use from many threads.
    """

    def __init__(
        self,
        read_generation: Callable[[], int | None],
        *,
        clock: Callable[[], float] = time.monotonic,
        max_age_s: float = 0.5,
    ) -> None:
        self._read_generation = read_generation
        self._clock = clock
        self._max_age_s = max_age_s
        self._lock = threading.Lock()
        self._answers: dict[Key, Answer] = {}
        self._generation: int | None = None
        self._checked_at = float("-inf")
        self._epoch = 0  # counts clearings: an answer read before one is not kept after it

    def get(self, key: Key, load: Callable[[Key], Answer]) -> Answer:
        """The remembered answer, else load(key); what `load` raises is not remembered."""
        if self._clock() - self._checked_at > self._max_age_s:
            self._look_for_writes()
        answer = self._answers.get(key)
        if answer is not None:
            return answer
        epoch = self._epoch
        answer = load(key)
        with self._lock:
            if epoch == self._epoch:
                if len(self._answers) >= MAX_ANSWERS:
                    self._answers.clear()
                self._answers[key] = answer
        return answer

    def peek(self, key: Key) -> Answer | None:
        """The remembered answer if it is fresh; else None. Never waits."""
        return None if self._clock() - self._checked_at > self._max_age_s else self._answers.get(key)

    def clear(self) -> None:
        """Forget everything: this process wrote."""
        with self._lock:
            self._answers.clear()
            self._epoch += 1

    def _look_for_writes(self) -> None:
        now = self._clock()
        generation = self._read_generation()
        if generation is not None and generation != self._generation:
            self.clear()
        with self._lock:
            self._generation = self._generation if generation is None else generation
            self._checked_at = now
