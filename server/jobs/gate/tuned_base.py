"""A fully trained base beside the original: scored as if it were an adapter of it. Knows two scorers."""

from __future__ import annotations

from collections.abc import Sequence

from server.jobs.gate.serving_scorer import ServingScorer
from trainer.data.types import EncodedExample
from trainer.gate.scorer import BASE_ALONE, Losses


class TunedBase:
    """Scale BASE_ALONE is the old base, scale 1 the new one. Neither scorer has an adapter."""

    def __init__(self, before: ServingScorer, after: ServingScorer) -> None:
        self._before = before
        self.after = after

    @property
    def vocab_size(self) -> int:
        return self.after.vocab_size

    @property
    def max_tokens(self) -> int:
        return min(self._before.max_tokens, self.after.max_tokens)

    def losses(self, examples: Sequence[EncodedExample], *, scale: float = 1.0) -> Losses:
        """As ServingScorer.losses."""
        return self._at(scale).losses(examples, scale=BASE_ALONE)

    def answers(
        self, prompts: Sequence[Sequence[int]], scales: Sequence[float], *, max_new_tokens: int, eos_ids: frozenset[int]
    ) -> list[list[list[int]]]:
        """As ServingScorer.answers."""
        return [
            self._at(scale).generate(prompts, scale=BASE_ALONE, max_new_tokens=max_new_tokens, eos_ids=eos_ids)
            for scale in scales
        ]

    def _at(self, scale: float) -> ServingScorer:
        if scale not in (BASE_ALONE, 1.0):
            raise ValueError(f"a trained base has no scale except {BASE_ALONE} and 1, got {scale}")
        return self.after if scale else self._before
