"""Makes one vector of a prompt: the hidden state of its last token, or the mean of all. Knows tensors; no text.

Legend: T tokens of the step, H hidden size. Hidden states are those that the head reads, behind the last norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.model.forward import StepOutput
from server.engine.schedule import ScheduledRow


@contextmanager
def hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """What the decoder of a transformers model returns inside the block, [1, T, H] for each forward."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: object, output: Sequence[Tensor]) -> None:
        kept.append(output[0])

    handle = model.base_model.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


@dataclass(slots=True)
class _Sum:
    """Of the hidden states of tokens 0..stop-1, in float32."""

    total_H: Tensor
    stop: int = 0


class Pooler:
    """Keeps the sums of prompts that are computed in chunks."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sum] = {}

    def add(self, rows: Sequence[ScheduledRow], hidden_TH: Tensor, output: StepOutput) -> None:
        """The rows' hidden states, in their order. A row may come again after a failed forward, and a preempted
        request from its first token."""
        start = 0
        for row in rows:
            if row.request.params.pooling is not None:
                self._add(row, hidden_TH[start : start + row.num_tokens].float(), output)
            start += row.num_tokens

    def forget(self, request_id: str) -> None:
        self._sums.pop(request_id, None)

    def _add(self, row: ScheduledRow, hidden_TH: Tensor, output: StepOutput) -> None:
        pooled_H = self._mean(row, hidden_TH) if row.request.params.pooling == "mean" else hidden_TH[-1]
        if not row.samples:
            return
        embedding = pooled_H.cpu().numpy()
        if torch.isfinite(pooled_H).all():
            output.embeddings[row.request.id] = embedding
        else:
            output.non_finite.append(row.request)

    def _mean(self, row: ScheduledRow, hidden_TH: Tensor) -> Tensor:
        if row.start == 0:
            self._sums[row.request.id] = _Sum(torch.zeros_like(hidden_TH[0]))
        known = self._sums[row.request.id]
        if known.stop == row.start:
            known.total_H = known.total_H + hidden_TH.sum(0)
            known.stop = row.start + row.num_tokens
        return known.total_H / known.stop
