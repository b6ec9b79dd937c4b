"""What the gate needs from a model: losses, at a scale of the adapter. Knows no model and no adapter.

The real scorer runs the server's own engine on the precision that serves: `server/jobs/gate/serving_scorer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.data.types import EncodedExample

BASE_ALONE = 0.0


@dataclass(frozen=True, eq=False)
class Losses:
    """nll: float64 [n], each example's sum of weight x negative log-likelihood, in nats. weight: float64 [n]."""

    nll: NDArray[np.float64]
    weight: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Nats per learned token."""
        return float(self.nll.sum() / self.weight.sum())


class Scorer(Protocol):
    """scale multiplies the adapter's effect: 1 as trained, BASE_ALONE without it."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens the model chooses among."""

    def losses(self, examples: Sequence[EncodedExample], *, scale: float = 1.0) -> Losses:
        """One entry per example. Logits that are not finite give a loss that is not finite."""
