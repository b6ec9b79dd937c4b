"""What sampling keeps: the tokens a request has used, and a batch's parameters as tensors. Samples nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from lora_kernels.transfer import to_device
from server.engine.request import Request, SamplingParams
from server.engine.sampling.token_picking import OFF_TOP_P, Filters

Kind = Literal["greedy", "from_all", "from_best"]
GREEDY_BELOW = 1e-5  # a temperature under this is 0: the best token would win every draw anyway


class TokenHistory:
    """The distinct tokens of one request, and how often its output holds each. An update costs the new tokens only.

    It holds the prompt's tokens if they are penalised (repetition_penalty).
    """

    __slots__ = ("_counts", "_ids", "_last_id", "_num_counted", "_position_of", "_prompt_ids", "_vocab_size")

    def __init__(self, request: Request, vocab_size: int) -> None:
        has_prompt = request.params.repetition_penalty != 1.0
        prompt_ids = np.unique(np.asarray(request.prompt_ids if has_prompt else [], dtype=np.int64))
        self._prompt_ids = prompt_ids[(prompt_ids >= 0) & (prompt_ids < vocab_size)]
        self._vocab_size = vocab_size
        self._num_counted, self._last_id = 0, -1
        self._restart()

    def catch_up(self, output_ids: Sequence[int]) -> None:
        """Count the tokens since the last call; count all again if `output_ids` is not a continuation."""
        known = self._num_counted
        if len(output_ids) < known or (known and output_ids[known - 1] != self._last_id):
            self._restart()
        for token_id in output_ids[self._num_counted :]:
            self._count(token_id)
        self._num_counted = len(output_ids)
        self._last_id = output_ids[-1] if output_ids else -1

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Distinct tokens, in no order."""
        return self._ids[: len(self._position_of)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """How often the output holds each of `ids`; 0 if only the prompt holds it."""
        return self._counts[: len(self._position_of)]

    def _restart(self) -> None:
        size = len(self._prompt_ids)
        self._ids = np.zeros(size + 64, dtype=np.int64)
        self._ids[:size] = self._prompt_ids
        self._counts = np.zeros(size + 64, dtype=np.float32)
        self._position_of = {token_id: index for index, token_id in enumerate(self._prompt_ids.tolist())}
        self._num_counted, self._last_id = 0, -1

    def _count(self, token_id: int) -> None:
        if not 0 <= token_id < self._vocab_size:  # its index would lie in another request's row
            return
        position = self._position_of.setdefault(token_id, len(self._position_of))
        if position == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[position] = token_id
        self._counts[position] += 1


@dataclass(frozen=True, slots=True)
class PickGroup:
    """Rows that are sampled by one method. rows None: every row. filters and keys: for the rows of this group."""

    rows: torch.Tensor | None
    indices: list[int]
    filters: Filters
    keys: npt.NDArray[np.uint64]
    first_candidates: int = 0
    needs_totals: bool = False


@dataclass(slots=True)
class SamplingPlan:
    """The parameters of one batch; valid while the batch holds the same requests in the same rows.

    bias_index, bias: positions row * V + token in the flattened scores, and the value to add there.
    """

    vocab_size: int
    groups: dict[Kind, PickGroup] = field(default_factory=dict)
    bias_index: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    penalised: list[tuple[int, TokenHistory]] = field(default_factory=list)
    banned: list[tuple[int, npt.NDArray[np.int64]]] = field(default_factory=list)
    constrained: list[int] = field(default_factory=list)
    with_logprobs: list[int] = field(default_factory=list)

    @property
    def is_plain_greedy(self) -> bool:
        return self.groups.keys() <= {"greedy"} and not (self.edits_scores or self.with_logprobs)

    @property
    def needs_last_token(self) -> bool:
        """Whether the host must know a row's last token to sample the next."""
        return bool(self.penalised or self.constrained)

    @property
    def edits_scores(self) -> bool:
        return bool(self.penalised or self.banned or self.constrained or self.bias_index is not None)


class PlanBuilder:
    """Reads a batch's requests once. keys: one 64-bit number per request, which seeds its random numbers."""

    def __init__(self, requests: Sequence[Request], vocab_size: int, device: torch.device, keys: Sequence[int]) -> None:
        self._requests, self._vocab_size, self._device, self._keys = requests, vocab_size, device, keys

    def build(self, eos_ids: Sequence[int], histories: dict[str, TokenHistory]) -> SamplingPlan:
        """histories: by request id; missing ones are added."""
        kinds = [_kind(request.params, self._vocab_size) for request in self._requests]
        plan = SamplingPlan(self._vocab_size)
        plan.groups = {kind: self._group(kinds, kind) for kind in dict.fromkeys(kinds)}
        plan.with_logprobs = [row for row, request in enumerate(self._requests) if request.params.logprobs is not None]
        plan.bias_index, plan.bias = self._biases()
        for row, request in enumerate(self._requests):
            if request.params.has_penalties:
                if request.id not in histories:
                    histories[request.id] = TokenHistory(request, self._vocab_size)
                plan.penalised.append((row, histories[request.id]))
            if request.params.min_tokens:
                plan.banned.append((row, row * self._vocab_size + self._ending_ids(request.params, eos_ids)))
            if request.constraint is not None:
                plan.constrained.append(row)
        return plan

    def _group(self, kinds: list[Kind], kind: Kind) -> PickGroup:
        indices = [row for row, other in enumerate(kinds) if other == kind]
        params = [self._requests[row].params for row in indices]
        rows = None if len(indices) == len(kinds) else self._on_device(torch.tensor(indices))
        keys = np.array([self._keys[row] for row in indices], dtype=np.uint64)
        top_ks = [_effective_top_k(entry, self._vocab_size) for entry in params]
        is_whole_row = [entry.top_p < 1.0 and k == self._vocab_size for entry, k in zip(params, top_ks, strict=True)]
        needed = max((k for k in top_ks if k < self._vocab_size), default=0)
        return PickGroup(rows, indices, self._filters(params, top_ks), keys, needed, any(is_whole_row))

    def _filters(self, params: list[SamplingParams], top_ks: list[int]) -> Filters:
        def column(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
            return self._on_device(torch.tensor(values, dtype=dtype))[:, None]

        return Filters(
            temperature_R1=column([max(entry.temperature, GREEDY_BELOW) for entry in params], torch.float32),
            top_k_R1=column(top_ks, torch.int64),
            top_p_R1=column([entry.top_p if entry.top_p < 1.0 else OFF_TOP_P for entry in params], torch.float64),
            log_min_p_R1=column([entry.min_p for entry in params], torch.float32).log(),
        )

    def _biases(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        pairs = [
            (row * self._vocab_size + token_id, bias)
            for row, request in enumerate(self._requests)
            for token_id, bias in request.params.logit_bias
        ]
        if not pairs:
            return None, None
        index, bias = zip(*pairs, strict=True)
        return self._on_device(torch.tensor(index)), self._on_device(torch.tensor(bias, dtype=torch.float32))

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return to_device(tensor, self._device)

    def _ending_ids(self, params: SamplingParams, eos_ids: Sequence[int]) -> npt.NDArray[np.int64]:
        ending = {*params.stop_token_ids, *(() if params.ignore_eos else (*eos_ids, *params.end_ids))}
        return np.array([id_ for id_ in ending if id_ < self._vocab_size], dtype=np.int64)


def _kind(params: SamplingParams, vocab_size: int) -> Kind:
    if params.is_greedy or params.temperature < GREEDY_BELOW or params.top_k == 1:
        return "greedy"
    if params.top_p == 1.0 and params.min_p == 0.0 and _effective_top_k(params, vocab_size) == vocab_size:
        return "from_all"
    return "from_best"


def _effective_top_k(params: SamplingParams, vocab_size: int) -> int:
    return min(params.top_k or vocab_size, vocab_size)
