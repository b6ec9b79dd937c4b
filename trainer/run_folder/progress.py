"""How far a run has come: all the loop knows beside weights and optimizer. Pure values; no files, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

from trainer.data.types import DataCursor


class Evaluation(NamedTuple):
    """Held-out loss after optimizer step `step`, in nats per supervised token."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """step: optimizer steps done. cursor: the next one's data. train_s: seconds spent in steps, over all starts."""

    step: int = 0
    cursor: DataCursor = field(default_factory=DataCursor)
    tokens: int = 0
    train_s: float = 0.0
    base_loss: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the least loss; the earliest of equals."""
        return next(iter(self._best_first), None)

    def best_steps(self, count: int) -> list[int]:
        """Steps of the `count` best evaluations, best first."""
        return [evaluation.step for evaluation in self._best_first[:count]]

    @property
    def _best_first(self) -> list[Evaluation]:
        return sorted(self.evaluations, key=lambda evaluation: (evaluation.loss, evaluation.step))

    def is_stale(self, patience: int) -> bool:
        """Whether the last `patience` evaluations brought nothing better; never with patience 0. The untrained base
        counts as the evaluation before the first step."""
        if not patience or self.best is None:
            return False
        is_below_base = self.base_loss is None or self.best.loss < self.base_loss
        best_step = self.best.step if is_below_base else 0
        return sum(evaluation.step > best_step for evaluation in self.evaluations) >= patience

    def with_evaluation(self, loss: float) -> Progress:
        return replace(self, evaluations=(*self.evaluations, Evaluation(self.step, loss)))

    @classmethod
    def from_mapping(cls, body: Mapping[str, Any]) -> Self:
        """The inverse of `asdict`."""
        evaluations = tuple(Evaluation(*each) for each in body["evaluations"])
        return cls(**{**body, "cursor": DataCursor(**body["cursor"]), "evaluations": evaluations})
