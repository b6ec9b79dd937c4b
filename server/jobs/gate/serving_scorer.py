"""Scores and generates as the server does: the engine's own model, kernels, KV blocks and precision, without its queue.

One base, and the adapter once for every scale, each in a slot of its own. A row names its slot, so the base alone and
every scale run through the same forward that serves. Knows tokens and losses; decides nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from adapters_store.base.description import AdapterDigest
from adapters_store.format.adapter_folder import plan_folder
from adapters_store.format.invocation import last_place
from adapters_store.packed.layout import PackedAdapter
from adapters_store.packed.packing import pack
from adapters_store.parsing.adapter_files import WEIGHTS_FILE
from server.engine.model.adapter_copier import table_of
from server.engine.model.base_model import BaseModel
from server.engine.model.batch import Batch
from server.engine.model.kv_tensors import KVCache
from server.engine.model.runner import ModelRunner
from server.engine.request import Request, SamplingParams, TokenConstraint
from server.engine.sampling.sampler import Sampler
from server.engine.schedule import Schedule, ScheduledRow
from server.engine.text.vocabulary import Vocabulary
from trainer.data.types import EncodedExample
from trainer.gate.scorer import BASE_ALONE, Losses

_BLOCK_SIZE = 16
_LOSS_ROWS = 256  # logits turned to float32 at once


def pack_folder(folder: Path, base: BaseModel) -> PackedAdapter:
    """A PEFT folder in device layout, its values checked. Raises AdapterRejected."""
    return pack(plan_folder(folder, base.description), folder / WEIGHTS_FILE, check=True)


@dataclass(frozen=True, kw_only=True)
class ScorerSettings:
    """scales: those that can be scored. forward_tokens: in one forward. max_tokens: the longest sequence.

    vocabulary: the tokens that `generate` may produce, as in the server; losses use the whole head, as in training.
    invocation: the tokens that switch the adapter on, if it is an activated LoRA; without them a text runs as the base.
    """

    scales: tuple[float, ...] = (1.0, 0.85, 0.7)
    forward_tokens: int = 1024
    max_tokens: int = 4096
    vocabulary: Vocabulary | None = None
    invocation: tuple[int, ...] | None = None


class ServingScorer:
    """A `trainer.gate.scorer.Scorer` over the engine's model. One thread only. adapter None: the base alone."""

    def __init__(self, base: BaseModel, adapter: PackedAdapter | None, settings: ScorerSettings | None = None) -> None:
        self.base = base
        self._settings = settings or ScorerSettings()
        self.max_tokens = min(self._settings.max_tokens, base.max_model_len)
        scales = dict.fromkeys((1.0, *self._settings.scales)) if adapter else ()
        self._slots = {scale: slot for slot, scale in enumerate(scales)}
        self._table = table_of(base, [_scaled(adapter, scale) for scale in self._slots] if adapter else [])
        self._num_blocks = _blocks(self.max_tokens) + 2 * _blocks(self._settings.forward_tokens)
        cache = KVCache.allocate(base, num_blocks=self._num_blocks, block_size=_BLOCK_SIZE)
        self._runner = ModelRunner(base, cache, self._table, Sampler(), self._settings.vocabulary)
        self._numbers = itertools.count()

    @property
    def vocab_size(self) -> int:
        return int(self.base.config.vocab_size)

    @torch.inference_mode()
    def losses(self, examples: Sequence[EncodedExample], *, scale: float = 1.0) -> Losses:
        """Each example's weighted nll, in nats. Raises ValueError for an unknown scale or a sequence too long."""
        nll = np.zeros(len(examples))
        requests = [self._request(example.input_ids.tolist(), scale) for example in examples]
        number = {request.id: index for index, request in enumerate(requests)}
        for request, start, logits_TV in self._forwards(requests):
            index = number[request.id]
            nll[index] += _weighted_nll(logits_TV, examples[index], start)
        return Losses(nll, np.array([example.weight for example in examples]))

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Sequence[int]], *, scale: float = 1.0) -> list[torch.Tensor]:
        """Logits [T, V] of each prompt, float32 on the CPU; the prompts share forwards."""
        requests = [self._request(list(prompt), scale) for prompt in prompts]
        pieces: dict[str, list[torch.Tensor]] = {request.id: [] for request in requests}
        for request, _, logits_TV in self._forwards(requests):
            pieces[request.id].append(logits_TV.float().cpu())
        return [torch.cat(pieces[request.id]) for request in requests]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        scale: float | Sequence[float] = 1.0,
        max_new_tokens: int = 64,
        eos_ids: frozenset[int] = frozenset(),
        constraints: Sequence[TokenConstraint] = (),
    ) -> list[list[int]]:
        """Greedy continuations, without the token of eos_ids that ended them, if one did. scale: of all prompts, or of
        each. constraints: one for each prompt, at its start, or none."""
        params = SamplingParams(max_tokens=max_new_tokens, temperature=0.0)
        scales = [scale] * len(prompts) if isinstance(scale, float) else scale
        asked = zip(prompts, scales, strict=True)
        requests = [self._request(list(prompt), each, params, new=max_new_tokens) for prompt, each in asked]
        for request, constraint in zip(requests, constraints, strict=bool(constraints)):
            request.constraint = constraint
        for group in self._groups(requests):
            alive = list(group)
            while alive:
                schedule = _schedule(alive, self._settings.forward_tokens)
                over = _commit(schedule, self._runner.run(schedule).tokens, eos_ids, self.base.rope_switches)
                alive = [request for request in alive if request.id not in over]
            for request in group:
                self._runner.forget(request.id)
        return [_without_end(request.output_ids, eos_ids) for request in requests]

    def answers(
        self, prompts: Sequence[Sequence[int]], scales: Sequence[float], *, max_new_tokens: int, eos_ids: frozenset[int]
    ) -> list[list[list[int]]]:
        """Greedy continuations of all prompts at each scale, in the same forwards: a step reads the weights once."""
        rows, each = [*prompts] * len(scales), [scale for scale in scales for _ in prompts]
        found = self.generate(rows, scale=each, max_new_tokens=max_new_tokens, eos_ids=eos_ids)
        return [found[index * len(prompts) :][: len(prompts)] for index in range(len(scales))]

    def _request(self, ids: list[int], scale: float, params: SamplingParams | None = None, *, new: int = 0) -> Request:
        if len(ids) + new > self.max_tokens:
            raise ValueError(f"a sequence has {len(ids) + new} tokens, the scorer takes {self.max_tokens}")
        if scale != BASE_ALONE and scale not in self._slots:
            raise ValueError(f"scale must be one of {sorted(self._slots)} or {BASE_ALONE}, got {scale}")
        slot = None if scale == BASE_ALONE else self._slots[scale]
        return Request(
            id=f"gate-{next(self._numbers)}",
            tenant="gate",
            prompt_ids=ids,
            params=params or SamplingParams(max_tokens=0, prompt_logprobs=0),
            adapter=None if slot is None else AdapterDigest(f"scale {scale:g}"),
            slot=slot,
            block_ids=list(range(_blocks(len(ids) + new))),
            active_from=self._active_from(ids),
        )

    def _active_from(self, ids: list[int]) -> int:
        invocation = self._settings.invocation
        place = 0 if invocation is None else last_place(ids, invocation)
        return self.max_tokens if place is None else place

    def _groups(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Groups of requests whose blocks fit at the same time; assigns the blocks."""
        group: list[Request] = []
        used = 0
        for request in requests:
            wanted = len(request.block_ids)
            if used + wanted > self._num_blocks:
                yield group
                group, used = [], 0
            request.block_ids = list(range(used, used + wanted))
            group.append(request)
            used += wanted
        if group:
            yield group

    def _forwards(self, requests: Sequence[Request]) -> Iterator[tuple[Request, int, torch.Tensor]]:
        """(request, first position, logits of its tokens from there on), until every token has been seen."""
        for group in self._groups(requests):
            alive = list(group)
            while alive:
                schedule = _schedule(alive, self._settings.forward_tokens)
                batch = Batch.build(schedule, block_size=_BLOCK_SIZE, table=self._table, device=self.base.device)
                pieces = self._runner.forward(batch).split([row.num_tokens for row in schedule.rows])
                for row, piece in zip(schedule.rows, pieces, strict=True):
                    yield row.request, row.start, piece
                    row.request.num_computed_tokens += row.num_tokens
                alive = [request for request in alive if request.num_computed_tokens < request.num_tokens]


def _blocks(num_tokens: int) -> int:
    return -(-num_tokens // _BLOCK_SIZE)


def _scaled(adapter: PackedAdapter, scale: float) -> PackedAdapter:
    return replace(adapter, modules=tuple(replace(module, scale=module.scale * scale) for module in adapter.modules))


def _schedule(requests: Sequence[Request], forward_tokens: int) -> Schedule:
    """As many tokens of the requests as one forward takes, the first requests first."""
    rows: list[ScheduledRow] = []
    left = forward_tokens
    for request in requests:
        count = min(left, request.num_tokens - request.num_computed_tokens)
        if count:
            rows.append(ScheduledRow(request, request.num_computed_tokens, count))
            left -= count
    rows.sort(key=lambda row: row.num_tokens != 1)  # decodes first, as in the scheduler
    return Schedule(rows, forward_tokens - left, sum(row.num_tokens == 1 for row in rows))


def _weighted_nll(logits_TV: torch.Tensor, example: EncodedExample, start: int) -> float:
    """Weighted nll of the tokens that logits from position `start` on predict."""
    stop = min(start + len(logits_TV) + 1, len(example))
    weights = example.weights[start + 1 : stop]
    rows = np.flatnonzero(weights)
    targets = torch.from_numpy(example.input_ids[start + 1 : stop][rows].astype(np.int64))
    factors = torch.from_numpy(weights[rows]).double()
    total = 0.0
    for first in range(0, len(rows), _LOSS_ROWS):
        part = slice(first, first + _LOSS_ROWS)
        chosen = logits_TV[torch.from_numpy(rows[part]).to(logits_TV.device)].float()
        nll = torch.nn.functional.cross_entropy(chosen, targets[part].to(chosen.device), reduction="none")
        total += float((nll.double().cpu() * factors[part]).sum())
    return total


def _commit(
    schedule: Schedule, tokens: dict[str, int], eos_ids: frozenset[int], rope_switches: Sequence[int]
) -> set[str]:
    """Record a step's tokens. Returns the ids of finished requests, among them those whose logits were not finite.

    A request that has outgrown LongRoPE's short factors begins again: its keys are no longer valid.
    """
    over: set[str] = set()
    for row in schedule.rows:
        request, sampled = row.request, row.samples
        request.num_computed_tokens += row.num_tokens
        if not sampled:
            continue
        token = tokens.get(request.id)
        if token is not None:
            request.output_ids.append(token)
            if request.num_tokens - 1 in rope_switches:
                request.num_computed_tokens = 0
        if (
            token is None
            or token in eos_ids
            or _is_whole(request)
            or len(request.output_ids) == request.params.max_tokens
        ):
            over.add(request.id)
    return over


def _is_whole(request: Request) -> bool:
    """Whether its constraint lets nothing follow."""
    if request.constraint is None:
        return False
    request.constraint.advance(request.output_ids)
    return request.constraint.is_complete or request.constraint.failure is not None


def _without_end(ids: list[int], eos_ids: frozenset[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in eos_ids else ids
