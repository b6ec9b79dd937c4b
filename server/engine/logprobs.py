"""Log-probabilities of chosen tokens and of the best alternatives. Knows logits; knows nothing of sampling.

They are of the model's own distribution: no temperature, penalty or bias. T rows, V vocabulary entries, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.engine.request import TokenLogprob
from server.engine.sampling_ops import ordered_topk

LOWEST_LOGPROB = -9999.0  # stands for an impossible token, because JSON has no minus infinity
_CHUNK_ELEMENTS = 2**20  # logits taken to float32 at once: 4 MiB
_TIE_MARGIN = 16  # candidates beyond k, so that equal scores at its edge are ordered by id


def token_logprobs(logits_TV: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """One entry per row: natural-log probability of token_ids[t] and of its num_top[t] likeliest tokens, best first.

    logits_TV: any float dtype; computed in float32, a bounded number of rows at a time. Entries of a row that holds NaN
    or +inf are NaN.
    """
    chunk = max(1, _CHUNK_ELEMENTS // logits_TV.shape[-1])
    entries: list[TokenLogprob] = []
    for start in range(0, len(token_ids), chunk):
        stop = start + chunk
        entries += _chunk_logprobs(logits_TV[start:stop].float(), token_ids[start:stop], num_top[start:stop])
    return entries


def _chunk_logprobs(logits_TV: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    norm_T1 = logits_TV.logsumexp(-1, keepdim=True)
    ids_T1 = torch.tensor(token_ids, device=logits_TV.device)[:, None]
    chosen = _listed(logits_TV.gather(-1, ids_T1) - norm_T1)
    k = max(num_top)
    if k == 0:
        return [TokenLogprob(token_id, row[0]) for token_id, row in zip(token_ids, chosen, strict=True)]
    values_TK, best_TK = ordered_topk(logits_TV, min(k + _TIE_MARGIN, logits_TV.shape[-1]))
    tops = zip(best_TK[:, :k].tolist(), _listed(values_TK[:, :k] - norm_T1), num_top, strict=True)
    return [
        TokenLogprob(token_id, row[0], tuple(zip(ids[:count], logprobs[:count], strict=True)))
        for token_id, row, (ids, logprobs, count) in zip(token_ids, chosen, tops, strict=True)
    ]


def _listed(logprobs: torch.Tensor) -> list[list[float]]:
    rows: list[list[float]] = logprobs.clamp_(min=LOWEST_LOGPROB).tolist()
    return rows
