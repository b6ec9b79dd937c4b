"""Trains an activated LoRA on packed examples: PEFT's layers, switched on token by token instead of row by row.

PEFT's own form takes how many tokens count from the end of each row, and a packed row holds many examples. Knows token
ids; knows no data. Source: Activated LoRA (arXiv 2504.12397) and peft/tuners/lora/variants.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import Tensor

from adapters_store.format.invocation import last_place
from trainer.model.adapter import NAME
from trainer.spec import SpecError


class Invocation:
    """The tokens that switch the adapter on, and which tokens of the forward under way it changes. One for all layers.

    Backward passes that compute layers again use the same, so a forward's backward comes before the next forward.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = tuple(token_ids)
        self.active_N: Tensor | None = None  # which tokens: found once a forward, since a GPU waits for such a search

    def mark(self, input_ids: Tensor, segments: Sequence[int]) -> None:
        """input_ids: [1, T]. segments: tokens of each text in it; in each, the adapter is on from the first token of
        the invocation's last place, and off everywhere if it is not there."""
        active = torch.zeros(input_ids.shape[1], dtype=torch.bool)
        start, ids = 0, input_ids[0].tolist()
        for length in segments:
            place = last_place(ids[start : start + length], self._token_ids)
            if place is not None:
                active[start + place : start + length] = True
            start += length
        self.active_N = active.nonzero()[:, 0].to(input_ids.device)

    def mark_all(self, input_ids: Tensor) -> None:
        """Tokens that follow an invocation."""
        self.active_N = torch.arange(input_ids.shape[1], device=input_ids.device)


def activate(peft: PeftModel, token_ids: Sequence[int]) -> Invocation | None:
    """Switch an activated LoRA's layers token by token. None: it is an ordinary adapter. Raises SpecError for the head,
    which sees chosen tokens only."""
    if not token_ids:
        return None
    invocation = Invocation(token_ids)
    for name, layer in peft.named_modules():
        if isinstance(layer, LoraLayer):
            if name.endswith("lm_head"):
                limit = "without lm_head with adapter.alora_invocation_tokens"
                raise SpecError("adapter.target_modules", "lm_head", limit)
            layer.lora_variant[NAME] = _ByToken(invocation)
    return invocation


class _ByToken(ALoraLinearVariant):  # type: ignore[misc]  # PEFT has no types
    """What a layer adds to its base's product [1, T, O]."""

    def __init__(self, invocation: Invocation) -> None:
        self._invocation = invocation

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        rows_N = self._invocation.active_N
        assert rows_N is not None, "a forward marks its active tokens first"
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        chosen = module.lora_dropout[active_adapter](x[0, rows_N].to(lora_a.weight.dtype))
        delta = lora_b(lora_a(chosen)) * module.scaling[active_adapter]
        return result.index_add(1, rows_N, delta[None].to(result.dtype))
