"""Picks one token per row from scores and one uniform number per row. Pure functions; knows no requests.

R rows, V vocabulary entries, K best candidates of a row, B blocks of a row.

Tokens are picked by inverting the cumulative distribution: one random number per row instead of V (drawing V
exponentials for 32 rows of 128 k entries takes 63 ms on one CPU core; this takes a tenth). Among equal scores the lower
id ranks first, so what top-k and top-p keep never depends on the rest of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

FIRST_CANDIDATES = 128  # enough for most rows; the others are sorted whole
UNDECIDED = -2  # instead of a token that the best candidates cannot decide
_BLOCK = 64
OFF_TOP_P = 2.0  # above any reachable mass, so that rounding near 1 drops nothing


@dataclass(frozen=True, slots=True)
class Filters:
    """temperature_R1 float32 > 0; top_k_R1 int64, V when off; top_p_R1 float64, OFF_TOP_P when off; log_min_p_R1
    float32, -inf when off. total_R1: float64 mass of the whole row in units of its best token's, for rows whose top_p
    applies to the whole row; rows with a top_k ignore it.
    """

    temperature_R1: torch.Tensor
    top_k_R1: torch.Tensor
    top_p_R1: torch.Tensor
    log_min_p_R1: torch.Tensor
    total_R1: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> Filters:
        return Filters(
            self.temperature_R1[index],
            self.top_k_R1[index],
            self.top_p_R1[index],
            self.log_min_p_R1[index],
            None if self.total_R1 is None else self.total_R1[index],
        )


def ordered_topk(scores_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best scores of each row and their ids, best first, equal scores by lower id. Of several equal to the k-th,
    which are returned is undefined unless k is V.
    """
    if k >= scores_RV.shape[-1]:
        return _sorted(scores_RV)
    values_RK, ids_RK = scores_RV.topk(k, dim=-1)
    ids_RK, order_RK = ids_RK.sort(dim=-1)
    values_RK, rank_RK = values_RK.gather(-1, order_RK).sort(dim=-1, descending=True, stable=True)
    return values_RK, ids_RK.gather(-1, rank_RK)


def pick_from_all(
    scores_RV: torch.Tensor, peak_R1: torch.Tensor, filters: Filters, uniform_R1: torch.Tensor
) -> torch.Tensor:
    """Token ids [R] for rows without filters. Overwrites scores_RV: new memory costs more than the sums."""
    weights_RV = _relative_(scores_RV, peak_R1, filters).exp_()
    weights_RBb = _blocks(weights_RV)
    sums_RB = weights_RBb.sum(-1).double()
    ends_RB = sums_RB.cumsum(-1)
    block_R1 = _first_above(ends_RB, uniform_R1)
    sum_R1 = sums_RB.gather(-1, block_R1)
    start_R1 = ends_RB.gather(-1, block_R1) - sum_R1
    rest_R1 = ((uniform_R1 * ends_RB[:, -1:] - start_R1) / sum_R1).clamp(0.0, 1.0)
    index_R1b = block_R1[:, :, None].expand(-1, -1, _BLOCK)
    weights_Rb = weights_RBb.gather(1, index_R1b).squeeze(1).double()
    return (block_R1 * _BLOCK + _first_above(weights_Rb.cumsum(-1), rest_R1)).squeeze(-1)


def row_totals(scores_RV: torch.Tensor, peak_R1: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Mass of each row in units of its best token's, float64 [R, 1]."""
    weights_RV = _relative_(scores_RV.clone(), peak_R1, filters).exp_()
    return _blocks(weights_RV).sum(-1).double().sum(-1, keepdim=True)


def pick_from_best(
    scores_RV: torch.Tensor,
    filters: Filters,
    uniform_R1: torch.Tensor,
    k: int = FIRST_CANDIDATES,
    *,
    may_wait: bool = True,
) -> torch.Tensor:
    """Token ids [R] for rows with filters. Considers the k best tokens, and all tokens if those cannot decide a row.

    may_wait: the host may wait for the device to find such rows; if not, they get UNDECIDED.
    """
    vocab_size = scores_RV.shape[-1]
    k = k if k < vocab_size // 8 else vocab_size  # beyond, sorting everything costs no more
    ids_RK, weights_RK, is_decided_R = best_candidates(scores_RV, filters, k)
    tokens_R = ids_RK.gather(-1, _first_above(weights_RK.cumsum(-1), uniform_R1)).squeeze(-1)
    if k == vocab_size:
        return tokens_R
    if not may_wait:
        return torch.where(is_decided_R, tokens_R, UNDECIDED)
    if not bool(is_decided_R.all()):
        rows = (~is_decided_R).nonzero().squeeze(-1)
        tokens_R[rows] = pick_from_best(scores_RV[rows], filters.rows(rows), uniform_R1[rows], vocab_size)
    return tokens_R


def best_candidates(
    scores_RV: torch.Tensor, filters: Filters, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k best ids [R, K], best first; their float64 weights, 0 where top-k, top-p (of what top-k kept) or min-p drop
    them; and whether a row is decided, that is, no token beyond the k best can be picked.
    """
    values_RK, ids_RK = ordered_topk(scores_RV, k)
    relative_RK = _relative_(values_RK, values_RK[:, :1].clone(), filters)
    weights_RK = relative_RK.double().exp()
    rank_K = torch.arange(k, device=scores_RV.device)
    weights_RK = weights_RK.masked_fill(rank_K >= filters.top_k_R1, 0.0)
    total_R1 = weights_RK.sum(-1, keepdim=True)
    if filters.total_R1 is not None:
        total_R1 = torch.where(filters.top_k_R1 < scores_RV.shape[-1], total_R1, filters.total_R1)
    mass_before_RK = weights_RK.cumsum(-1) - weights_RK
    keep_RK = (rank_K < filters.top_k_R1) & (mass_before_RK < filters.top_p_R1 * total_R1)
    keep_RK &= relative_RK >= filters.log_min_p_R1
    last_kept_R1 = relative_RK.gather(-1, keep_RK.sum(-1, keepdim=True).sub_(1).clamp_(min=0))
    worst_R1 = relative_RK[:, -1:]
    is_decided_R1 = ~(last_kept_R1 <= worst_R1) | (worst_R1 == -torch.inf)  # a NaN row is decided: it has no token
    return ids_RK, weights_RK.masked_fill(~keep_RK, 0.0), is_decided_R1.squeeze(-1)


def _relative_(scores: torch.Tensor, peak_R1: torch.Tensor, filters: Filters) -> torch.Tensor:
    """In place: scores over temperature, the best token of each row at 0, so that no temperature overflows."""
    return scores.sub_(peak_R1).div_(filters.temperature_R1)


def _first_above(cumulative_RN: torch.Tensor, fraction_R1: torch.Tensor) -> torch.Tensor:
    """Index [R, 1] of the entry that holds `fraction` of the row's mass; always an entry of positive mass."""
    total_R1 = cumulative_RN[:, -1:].contiguous()
    index_R1 = torch.searchsorted(cumulative_RN, fraction_R1 * total_R1, right=True)
    last_R1 = torch.searchsorted(cumulative_RN, total_R1)
    return torch.minimum(index_R1, last_R1).clamp_(max=cumulative_RN.shape[-1] - 1)  # only NaN rows reach the clamp


def _sorted(scores_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if scores_RV.is_cuda:
        return torch.sort(scores_RV, dim=-1, descending=True, stable=True)
    ids_RV = torch.from_numpy(_sorted_ids(scores_RV.float().numpy()))
    return scores_RV.gather(-1, ids_RV), ids_RV


def _sorted_ids(scores_RV: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Sorts integers made of score and id: numpy does that with vector instructions, 20 times faster than torch."""
    bits_RV = (scores_RV + np.float32(0)).view(np.int32).astype(np.int64)  # + 0 makes -0 equal to 0
    ascending_RV = np.where(bits_RV < 0, bits_RV ^ 0x7FFFFFFF, bits_RV)  # integers in the order of the floats
    keys_RV = (-ascending_RV << 32) + np.arange(scores_RV.shape[-1])
    keys_RV.sort(axis=-1)
    return keys_RV & 0xFFFFFFFF


def _blocks(weights_RV: torch.Tensor) -> torch.Tensor:
    num_rows, vocab_size = weights_RV.shape
    missing = -vocab_size % _BLOCK
    padded = F.pad(weights_RV, (0, missing)) if missing else weights_RV
    return padded.reshape(num_rows, -1, _BLOCK)
