"""Log-probabilities of chosen tokens and of the best alternatives. Knows logits; knows nothing of sampling.

They describe the model's distribution: no temperature, penalty or bias. T rows, V vocabulary entries, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_kernels.transfer import ReadBack, to_device
from server.engine.request import TokenLogprob
from server.engine.sampling.token_picking import ordered_topk

LOWEST_LOGPROB = -9999.0  # an impossible token, because JSON has no minus infinity
_CHUNK_ELEMENTS = 2**20  # logits taken to float32 at once: 4 MiB
_TIE_MARGIN = 16  # candidates beyond k, so that equal scores at its edge are ordered by id


def token_logprobs(logits_TV: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """One entry per row: natural-log probability of token_ids[t] and of the num_top[t] likeliest tokens, best first.

    logits_TV: any float dtype; computed in float32, a bounded number of rows at a time. Entries of a row that holds NaN
    or +inf are NaN.
    """
    ids_T = to_device(torch.tensor(token_ids, dtype=torch.int64), logits_TV.device)
    return PendingLogprobs(logits_TV, ids_T, num_top).read(token_ids)


class PendingLogprobs:
    """The same, if the host does not know the token ids yet: launched, not waited for.

    ids_T: int64, on the device of the logits. Later launches may overwrite the logits.
    """

    def __init__(self, logits_TV: torch.Tensor, ids_T: torch.Tensor, num_top: Sequence[int]) -> None:
        chunk = max(1, _CHUNK_ELEMENTS // logits_TV.shape[-1])
        self._num_top = num_top
        self._chunks = [
            _chunk_logprobs(logits_TV[start : start + chunk].float(), ids_T[start : start + chunk], max(part))
            for start in range(0, len(num_top), chunk)
            if (part := num_top[start : start + chunk])
        ]

    def read(self, token_ids: Sequence[int]) -> list[TokenLogprob]:
        """token_ids: the content of `ids_T`. Waits for the device."""
        chosen: list[float] = []
        tops: list[tuple[list[int], list[float]]] = []
        for chunk in self._chunks:
            chosen_T, best_TK, values_TK = (tensor.tolist() for tensor in chunk.read())
            chosen += chosen_T
            tops += zip(best_TK, values_TK, strict=True)
        return [
            TokenLogprob(token_id, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
            for token_id, logprob, (ids, values), count in zip(token_ids, chosen, tops, self._num_top, strict=True)
        ]


def _chunk_logprobs(logits_TV: torch.Tensor, ids_T: torch.Tensor, k: int) -> ReadBack:
    """For each row: the chosen token's [T]; ids and values of the k best, [T, at most k]."""
    norm_T1 = logits_TV.logsumexp(-1, keepdim=True)
    chosen_T = (logits_TV.gather(-1, ids_T[:, None]) - norm_T1).squeeze(-1)
    if k == 0:
        nothing = logits_TV.new_empty(len(ids_T), 0)
        return ReadBack(_floored(chosen_T), nothing, nothing)
    values_TK, best_TK = ordered_topk(logits_TV, min(k + _TIE_MARGIN, logits_TV.shape[-1]))
    return ReadBack(_floored(chosen_T), best_TK[:, :k], _floored(values_TK[:, :k] - norm_T1))


def _floored(logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.clamp_(min=LOWEST_LOGPROB)
