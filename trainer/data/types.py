"""The nouns of training data: an encoded example, a packed batch, a step, a cursor. No decisions, no files, no text.

Legend: T tokens of one packed batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the server's job worker reads training files in a process without torch
    import torch

IGNORED = -100  # the label that the loss leaves out


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """One training text as tokens.

    input_ids: int32 [n], n >= 2. weights: float32 [n], what learning to predict this token counts: 0 for context,
    1 for a plain answer, a message's own `weight` in between; weights[0] is always 0, since nothing predicts it.
    digest: of the record's content, equal for duplicates. line: where it stood in its file, from 1. kind: the
    record's, "chat", "completion" or "text".

    A preference pair is one example too: the chosen text up to its last learned token, then the rejected text, whose
    weights are negative.
    """

    input_ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    digest: bytes = b""
    line: int = 0
    kind: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> NDArray[np.bool_]:
        """[n], true for every token that is learned."""
        mask: NDArray[np.bool_] = self.weights != 0
        return mask

    @property
    def end(self) -> int:
        """Behind the last learned token."""
        return int(np.flatnonzero(self.supervised)[-1]) + 1

    @cached_property
    def border(self) -> int:
        """Where the rejected text of a pair begins; 0 for an example that is no pair."""
        if not (self.weights < 0).any():
            return 0
        return int(np.flatnonzero(self.weights > 0)[-1]) + 1

    @property
    def segments(self) -> tuple[int, ...]:
        """Tokens of each text in it."""
        return (self.border, len(self) - self.border) if self.border else (len(self),)

    @cached_property
    def weight(self) -> float:
        """Sum of the token weights: the example's share in a loss normalised per token; a pair counts 1."""
        return 1.0 if self.border else float(self.weights.sum(dtype=np.float64))

    def text(self, *, chosen: bool) -> EncodedExample:
        """One text of a pair, its weights positive; of another example the example."""
        if not self.border:
            return self
        part = slice(self.border) if chosen else slice(self.border, None)
        return replace(self, input_ids=self.input_ids[part], weights=abs(self.weights[part]))


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Examples side by side in one forward; exact with reset positions and no attention mask.

    input_ids, position_ids: int64 [1, T], positions count from 0 in every example. labels: int64 [1, T], aligned with
    input_ids (not shifted): the token itself if it is learned, else IGNORED; the first token of every example is
    IGNORED, so a loss that shifts over the whole row never predicts across examples. weights: float32 [1, T], 0 if
    the label is IGNORED. A batch without a supervised token (`weight` 0) is filler that keeps ranks in step.
    pairs: int64 [1, T], of which preference pair (from 0) a token is; None: the examples are no pairs.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    num_examples: int
    pairs: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[1])

    @cached_property
    def weight(self) -> float:
        """What the batch's loss is divided by: learned tokens, each by its weight; or pairs."""
        return float(self.num_examples if self.pairs is not None else self.weights.double().sum())


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step on this rank.

    micro_batches: this rank's forwards, as many as on every other rank. weight: sum of the examples' weights over ALL
    ranks and micro batches of the step; the step's loss is sum(weight x nll) over everything, divided by it.
    num_tokens: over all ranks.
    """

    micro_batches: list[PackedBatch]
    weight: float
    num_tokens: int


@dataclass(frozen=True)
class DataCursor:
    """The next step to take: epoch from 0, step within the epoch from 0. All there is to resume the data exactly."""

    epoch: int = 0
    step: int = 0
