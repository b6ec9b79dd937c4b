"""Samples one token for each row of logits. Knows logits and sampling parameters; knows nothing of text or stop rules.

The order: logit_bias, penalties, min_tokens, the request's constraint; then the best token if temperature or top_p is
0, else temperature, top_k, top_p (of what top_k kept), min_p, and one draw. R rows, V vocabulary entries.

Whether a row is finite is checked on the model's own logits, so no request's parameters can make a sound row look like
a fault of its adapter. Edited scores stay finite, and no ban removes a row's last token. A constraint may: then the
token drawn breaks it, and the constraint says so.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from lora_kernels.elementwise.launcher import forbid_tokens
from lora_kernels.transfer import ReadBack, to_device
from server.engine.request import InvalidRequest, MaskSource, Request, SamplingParams, TokenLogprob
from server.engine.sampling.logprobs import PendingLogprobs, token_logprobs
from server.engine.sampling.masks import Masks, one_by_one
from server.engine.sampling.plan import PickGroup, PlanBuilder, SamplingPlan, TokenHistory
from server.engine.sampling.token_picking import FIRST_CANDIDATES, UNDECIDED, pick_from_all, pick_from_best, row_totals

NON_FINITE = -1  # instead of a token
_LOWEST, _HIGHEST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
_MASK_64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SampledRows:
    """One entry per row. A row in `non_finite` (its logits hold NaN or +inf, or only -inf) has token id -1 and must
    fail; the other rows are unaffected. logprobs: None for rows that did not ask. undecided: rows without a token (id
    -2), because deciding it would have made the host wait. Sampled again by a draw that may wait, they get it.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    non_finite: list[bool]
    undecided: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Draw:
    """One token for each request. num_unknown: tokens of each request that are sampled but not known to the host.
    offsets: tokens of a row's draft before this draw; none: no row has a draft."""

    requests: Sequence[Request]
    num_unknown: int = 0
    offsets: Sequence[int] = ()

    def num_output_tokens(self, row: int) -> int:
        """Tokens of the request's output before this draw."""
        num_drafted = self.offsets[row] if self.offsets else 0
        return len(self.requests[row].output_ids) + self.num_unknown + num_drafted


class Sampler:
    """Owned by one thread. eos_ids: the tokens that min_tokens bans. seed: for requests without one. masks: computes
    those of several constraints.

    A request with a seed gets the same tokens from the same logits in any batch: the random number of its n-th token
    depends on (seed, n) alone.
    """

    def __init__(self, eos_ids: Iterable[int] = (), *, seed: int | None = None, masks: MaskSource = one_by_one) -> None:
        self._eos_ids = sorted(eos_ids)
        self._keys = random.Random(seed)
        self._masks = Masks(masks)
        self._histories: dict[str, TokenHistory] = {}
        self._plan: SamplingPlan | None = None
        self._plan_of: tuple[object, ...] = ()
        self._resample: set[str] = set()  # requests that were undecided once

    def sample(self, logits_RV: torch.Tensor, requests: Sequence[Request], offsets: Sequence[int] = ()) -> SampledRows:
        """logits_RV: any float dtype, any device, not changed; row r belongs to requests[r].

        offsets: for each row how many tokens of the request's draft come before it. A request is drafted only if its
        draws do not depend on its last token.
        """
        return self.launch(logits_RV, requests, offsets=offsets).read()

    def prepare(self, requests: Sequence[Request]) -> None:
        """These will be sampled together next: begin what their logits are not needed for."""
        self._masks.begin(requests)

    def launch(
        self,
        logits_RV: torch.Tensor,
        requests: Sequence[Request],
        *,
        num_unknown: int = 0,
        offsets: Sequence[int] = (),
    ) -> PendingSampling:
        """The same without waiting for the tokens. Later launches may overwrite the logits.

        num_unknown: tokens of each request that are sampled but not known to the host; allowed if their draws
        `may_be_followed`. Then a row may stay `undecided`, because nothing waits in between.
        """
        plan, draw = self._plan_for(logits_RV, requests), Draw(requests, num_unknown, offsets)
        assert not (num_unknown and plan.needs_last_token), "sampling depends on a token that is not known yet"
        if plan.is_plain_greedy:
            peak_R, tokens_R = logits_RV.max(-1)
        else:
            tokens_R, peak_R = self._picked(self._edited(logits_RV, plan, draw), plan, draw)
            if plan.edits_scores:
                peak_R = logits_RV.amax(-1)
        tokens_R = torch.where(torch.isfinite(peak_R), tokens_R, NON_FINITE)
        logprobs = self._launch_logprobs(logits_RV, tokens_R, plan.with_logprobs, requests)
        ids = [request.id for request in requests]
        may_be_followed = not plan.needs_last_token and self._resample.isdisjoint(ids)
        return PendingSampling(tokens_R, plan.with_logprobs, logprobs, may_be_followed=may_be_followed)

    def resample(self, request_id: str) -> None:
        """The request was undecided: from now on its tokens are sampled by draws that may wait."""
        self._resample.add(request_id)

    def prompt_logprobs(self, logits_TV: torch.Tensor, targets: Sequence[int], k: int) -> list[TokenLogprob]:
        """Entry t: log-probability of targets[t] and the k likeliest tokens after logits_TV[t]. NaN logits give NaN."""
        return token_logprobs(logits_TV, targets, [k] * len(targets))

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that has ended. Unknown ids are allowed: most requests keep nothing."""
        self._histories.pop(request_id, None)
        self._resample.discard(request_id)
        if request_id in self._plan_of:
            self._plan, self._plan_of = None, ()

    def _plan_for(self, logits_RV: torch.Tensor, requests: Sequence[Request]) -> SamplingPlan:
        vocab_size, device = logits_RV.shape[-1], logits_RV.device
        plan_of = (vocab_size, device, *(request.id for request in requests))
        if self._plan is None or plan_of != self._plan_of:
            keys = [self._key(request.params.seed) for request in requests]
            self._plan = PlanBuilder(requests, vocab_size, device, keys).build(self._eos_ids, self._histories)
            self._plan_of = plan_of
        return self._plan

    def _key(self, seed: int | None) -> int:
        return self._keys.getrandbits(64) if seed is None else seed & _MASK_64

    def _edited(self, logits_RV: torch.Tensor, plan: SamplingPlan, draw: Draw) -> torch.Tensor:
        """A float32 copy with biases, penalties and bans applied; picking may overwrite it.

        A row with a finite logit keeps a finite score, unless its constraint allows no such token: if the model allows
        only banned tokens, one of them is sampled.
        """
        scores_RV = logits_RV.to(torch.float32, copy=True).contiguous()
        flat = scores_RV.view(-1)
        if plan.bias_index is not None and plan.bias is not None:
            flat[plan.bias_index] += plan.bias
        if plan.penalised:
            _penalise(flat, plan, draw.requests)
        banned = [
            index for row, index in plan.banned if draw.num_output_tokens(row) < draw.requests[row].params.min_tokens
        ]
        if banned:
            where = to_device(torch.from_numpy(np.concatenate(banned)), flat.device)
            flat[where] = flat[where].clamp(max=_LOWEST)
        if plan.constrained:
            rows_C = to_device(torch.tensor(plan.constrained), scores_RV.device)
            forbid_tokens(scores_RV, rows_C, to_device(self._masks.take(draw.requests), scores_RV.device))
        return scores_RV

    def _picked(self, scores_RV: torch.Tensor, plan: SamplingPlan, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows = scores_RV.shape[0]
        tokens_R = torch.zeros(num_rows, dtype=torch.int64, device=scores_RV.device)
        peak_R = torch.zeros(num_rows, dtype=torch.float32, device=scores_RV.device)
        for kind, group in plan.groups.items():
            part_RV = scores_RV if group.rows is None else scores_RV[group.rows]
            index = slice(None) if group.rows is None else group.rows
            tokens_R[index], peak_R[index] = _PICKS[kind](part_RV, group, draw)
        return tokens_R, peak_R

    def _launch_logprobs(
        self, logits_RV: torch.Tensor, tokens_R: torch.Tensor, wanted: Sequence[int], requests: Sequence[Request]
    ) -> PendingLogprobs | None:
        if not wanted:
            return None
        num_top = [requests[row].params.logprobs or 0 for row in wanted]
        if len(wanted) < len(requests):
            index = to_device(torch.tensor(wanted), logits_RV.device)
            logits_RV, tokens_R = logits_RV[index], tokens_R[index]
        return PendingLogprobs(logits_RV, tokens_R.clamp(min=0), num_top)


class PendingSampling:
    """Tokens that are being sampled. tokens_R: on the device, int64, negative for a row without a token.

    may_be_followed: whether the next tokens can be sampled before these are known.
    """

    def __init__(
        self,
        tokens_R: torch.Tensor,
        with_logprobs: Sequence[int],
        logprobs: PendingLogprobs | None,
        *,
        may_be_followed: bool,
    ) -> None:
        self.tokens_R = tokens_R
        self.may_be_followed = may_be_followed
        self._with_logprobs, self._logprobs = with_logprobs, logprobs
        self._tokens = ReadBack(tokens_R)

    def read(self) -> SampledRows:
        """Waits for the device."""
        token_ids: list[int] = self._tokens.read()[0].tolist()
        rows = SampledRows(
            token_ids,
            [None] * len(token_ids),
            [token_id == NON_FINITE for token_id in token_ids],
            [row for row, token_id in enumerate(token_ids) if token_id == UNDECIDED],
        )
        if self._logprobs is not None:
            entries = self._logprobs.read([token_ids[row] for row in self._with_logprobs])
            for row, entry in zip(self._with_logprobs, entries, strict=True):
                rows.logprobs[row] = entry if token_ids[row] >= 0 else None
        return rows


def validate_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidRequest for token ids that a vocabulary of `vocab_size` does not have, or that have two biases."""
    for name, ids in (
        ("logit_bias", [id_ for id_, _ in params.logit_bias]),
        ("stop_token_ids", params.stop_token_ids),
    ):
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(name, f"{name} has token id {token_id}; ids must be in [0, {vocab_size - 1}]")
    biased = [token_id for token_id, _ in params.logit_bias]
    if len(set(biased)) < len(biased):
        twice = next(token_id for token_id in biased if biased.count(token_id) > 1)
        raise InvalidRequest("logit_bias", f"logit_bias has token id {twice} more than once")


def uniforms(keys_R: npt.NDArray[np.uint64], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per row, a function of its key and position alone (SplitMix64's output function, twice)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    mixed = _mix(_mix(keys_R + golden) + np.asarray(positions, dtype=np.uint64) * golden)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _penalise(flat: torch.Tensor, plan: SamplingPlan, requests: Sequence[Request]) -> None:
    for row, history in plan.penalised:
        history.catch_up(requests[row].output_ids)
    index = np.concatenate([row * plan.vocab_size + history.ids for row, history in plan.penalised])
    params = [requests[row].params for row, _ in plan.penalised]
    by_row = [(entry.repetition_penalty, entry.presence_penalty, entry.frequency_penalty) for entry in params]
    by_token = np.repeat(
        np.array(by_row, dtype=np.float32), [len(history.ids) for _, history in plan.penalised], axis=0
    )
    counts = np.concatenate([history.counts for _, history in plan.penalised])
    numbers = torch.from_numpy(np.vstack([by_token.T, counts]))
    repetition, presence, frequency, count = to_device(numbers, flat.device)
    where = to_device(torch.from_numpy(index), flat.device)
    scores = flat[where]
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    penalised = (repeated - presence * (count > 0) - frequency * count).clamp(_LOWEST, _HIGHEST)
    flat[where] = torch.where(scores.isinf(), scores, penalised)


def _uniform_column(group: PickGroup, draw: Draw, device: torch.device) -> torch.Tensor:
    positions = [draw.num_output_tokens(row) for row in group.indices]
    return to_device(torch.from_numpy(uniforms(group.keys, positions)), device)[:, None]


def _greedy(scores_RV: torch.Tensor, group: PickGroup, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    peak_R, tokens_R = scores_RV.max(-1)
    return tokens_R, peak_R


def _from_all(scores_RV: torch.Tensor, group: PickGroup, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    peak_R1 = scores_RV.amax(-1, keepdim=True)
    uniform_R1 = _uniform_column(group, draw, scores_RV.device)
    return pick_from_all(scores_RV, peak_R1, group.filters, uniform_R1), peak_R1.squeeze(-1)


def _from_best(scores_RV: torch.Tensor, group: PickGroup, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    peak_R1, filters = scores_RV.amax(-1, keepdim=True), group.filters
    if group.needs_totals:
        filters = replace(filters, total_R1=row_totals(scores_RV, peak_R1, filters))
    uniform_R1 = _uniform_column(group, draw, scores_RV.device)
    num_candidates = max(FIRST_CANDIDATES, group.first_candidates + 1)
    tokens_R = pick_from_best(scores_RV, filters, uniform_R1, num_candidates, may_wait=draw.num_unknown == 0)
    return tokens_R, peak_R1.squeeze(-1)


_PICKS = {"greedy": _greedy, "from_all": _from_all, "from_best": _from_best}
