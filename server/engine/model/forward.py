"""The result of a forward, a forward that is pending, and the vectors of pooled prompts. Decides nothing.

Legend: T tokens of the step, H hidden size. Hidden states are those that the head reads, behind the last norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from server.engine.request import Request, TokenLogprob
from server.engine.sampling.sampler import PendingSampling, SampledRows
from server.engine.schedule import ScheduledRow


@dataclass(slots=True)
class StepOutput:
    """tokens, logprobs and embeddings by request id; prompt_logprobs: the chunk's entries by request id. followers: the
    tokens behind the first one, if a draft foresaw those before them.

    non_finite: requests whose logits held NaN or infinity; their token must not be used.
    undecided: requests that got no token. A later forward of schedule() samples the same token again.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    followers: dict[str, list[tuple[int, TokenLogprob | None]]] = field(default_factory=dict)
    logprobs: dict[str, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    embeddings: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    non_finite: list[Request] = field(default_factory=list)
    undecided: list[Request] = field(default_factory=list)

    def merge(self, other: StepOutput) -> None:
        self.tokens |= other.tokens
        self.followers |= other.followers
        self.logprobs |= other.logprobs
        self.prompt_logprobs |= other.prompt_logprobs
        self.embeddings |= other.embeddings
        self.non_finite += other.non_finite
        self.undecided += other.undecided

    def add(self, request: Request, sampled: SampledRows, index: int, draft: Sequence[int] = ()) -> None:
        """The request's token in row `index`, and those that its draft foresaw in the rows behind it. A draft may be
        what made the row's numbers infinite, so with one the row is undecided, and sampled again without."""
        if index in sampled.undecided or (draft and sampled.non_finite[index]):
            self.undecided.append(request)
        elif sampled.non_finite[index]:
            if request not in self.non_finite:
                self.non_finite.append(request)
        else:
            self.tokens[request.id] = sampled.token_ids[index]
            logprob = sampled.logprobs[index]
            if logprob is not None:
                self.logprobs[request.id] = logprob
            if draft:
                self.followers[request.id] = [*_followers(sampled, index, draft)]


def _followers(sampled: SampledRows, index: int, draft: Sequence[int]) -> Iterator[tuple[int, TokenLogprob | None]]:
    """What was drawn behind each token of the draft, as long as that token is the one that was drawn."""
    for row, guess in enumerate(draft, start=index):
        token = sampled.token_ids[row + 1]
        if sampled.token_ids[row] != guess or token < 0:
            return
        yield token, sampled.logprobs[row + 1]


@dataclass(frozen=True, slots=True)
class Completed:
    """A forward that was waited for at launch."""

    output: StepOutput
    may_be_followed: bool = field(init=False, default=False)

    def read(self, rows: Sequence[ScheduledRow]) -> StepOutput:
        return self.output


@dataclass(frozen=True, slots=True)
class InFlight:
    """A recorded step whose tokens are still on the device. row_of: request id -> row, of those that sample.

    resample: called with the id of each request that is left without a token.
    """

    row_of: Mapping[str, int]
    sampling: PendingSampling
    may_be_followed: bool  # the next forward can be launched before this one's tokens are known
    resample: Callable[[str], None]

    def read(self, rows: Sequence[ScheduledRow]) -> StepOutput:
        """The result of these rows. Waits for the device."""
        sampled, output = self.sampling.read(), StepOutput()
        for row in rows:
            if row.request.id in self.row_of:
                output.add(row.request, sampled, self.row_of[row.request.id])
        for request in output.undecided:
            self.resample(request.id)
        return output


PendingForward = Completed | InFlight


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
    """Makes one vector of a prompt: the hidden state of its last token, or the mean of all. Keeps the sums of prompts
    that are computed in chunks."""

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
