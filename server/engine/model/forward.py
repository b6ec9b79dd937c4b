"""The result of a forward, and a forward that is pending. Knows requests and tokens; decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from server.engine.request import Request, TokenLogprob
from server.engine.sampling.sampler import PendingSampling, SampledRows
from server.engine.schedule import ScheduledRow


@dataclass(slots=True)
class StepOutput:
    """tokens, logprobs and embeddings by request id; prompt_logprobs: the chunk's entries by request id.

    non_finite: requests whose logits held NaN or infinity; their token must not be used.
    undecided: requests that got no token. A later forward of schedule() samples the same token again.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    embeddings: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    non_finite: list[Request] = field(default_factory=list)
    undecided: list[Request] = field(default_factory=list)

    def merge(self, other: StepOutput) -> None:
        self.tokens |= other.tokens
        self.logprobs |= other.logprobs
        self.prompt_logprobs |= other.prompt_logprobs
        self.embeddings |= other.embeddings
        self.non_finite += other.non_finite
        self.undecided += other.undecided

    def add(self, request: Request, sampled: SampledRows, index: int) -> None:
        """The request's token in row `index`."""
        if index in sampled.undecided:
            self.undecided.append(request)
        elif sampled.non_finite[index]:
            if request not in self.non_finite:
                self.non_finite.append(request)
        else:
            self.tokens[request.id] = sampled.token_ids[index]
            logprob = sampled.logprobs[index]
            if logprob is not None:
                self.logprobs[request.id] = logprob


class PendingForward(Protocol):
    """A forward that was launched and not read yet."""

    @property
    def may_be_followed(self) -> bool:
        """Whether the next forward can be launched before this one's tokens are known."""

    def read(self, rows: Sequence[ScheduledRow]) -> StepOutput:
        """The result of these rows. Waits for the device."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A forward that was waited for at launch."""

    output: StepOutput
    may_be_followed: bool = field(init=False, default=False)

    def read(self, rows: Sequence[ScheduledRow]) -> StepOutput:
        return self.output


class InFlight:
    """A decode step whose tokens are still on the device. row_of: request id -> row.

    resample: called with the id of each request that is left without a token.
    """

    def __init__(
        self,
        rows: Sequence[ScheduledRow],
        sampling: PendingSampling,
        *,
        may_be_followed: bool,
        resample: Callable[[str], None],
    ) -> None:
        self.row_of = {row.request.id: index for index, row in enumerate(rows)}
        self.sampling = sampling
        self.may_be_followed = may_be_followed
        self._resample = resample

    def read(self, rows: Sequence[ScheduledRow]) -> StepOutput:
        sampled, output = self.sampling.read(), StepOutput()
        for row in rows:
            output.add(row.request, sampled, self.row_of[row.request.id])
        for request in output.undecided:
            self._resample(request.id)
        return output
