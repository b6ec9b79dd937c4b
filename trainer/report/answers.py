"""Greedy answers of the model in training. Knows tokens; for a few short samples, not for serving."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from trainer.model.model import Trainee


def greedy_answer(
    trainee: Trainee, prompt_ids: Sequence[int], *, max_new_tokens: int, end_ids: Collection[int]
) -> list[int]:
    """The likeliest token after each other, up to max_new_tokens; the end token is not part of it.

    transformers' own attention and cache. Random numbers are left alone, so a resumed run stays the same.
    """
    answer: list[int] = []
    ids, cache = torch.tensor([list(prompt_ids)], device=trainee.device), None
    invocation = trainee.module.invocation
    if invocation is not None:
        invocation.mark(ids, (len(prompt_ids),))
    with trainee.evaluating(), trainee.own_attention(), trainee.autocast():
        while len(answer) < max_new_tokens:
            out = trainee.module.causal(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = int(out.logits[0, -1].argmax())
            if token in end_ids:
                break
            answer.append(token)
            ids, cache = torch.tensor([[token]], device=trainee.device), out.past_key_values
            if invocation is not None:
                invocation.mark_all(ids)
    return answer
