"""The round trip's other side: transformers and PEFT on the same base and adapter. Knows models; compares nothing.

One model at a time is in memory. It is loaded once and rounded for the check in bfloat16; a 4-bit base loads twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from server.jobs.gate.serving_scorer import ServingScorer
from trainer.gate.round_trip import RoundTrip, compare
from trainer.gate.scorer import BASE_ALONE
from trainer.gate.thresholds import GateThresholds
from trainer.model.held import HeldBase, causal_of


@dataclass(frozen=True)
class Reference:
    """What is loaded. adapter None: the base alone. nf4: in 4 bits. held: a base that need not be read again."""

    base: Path
    adapter: Path | None
    device: torch.device
    nf4: bool = False
    held: HeldBase | None = None

    def load(self, dtype: torch.dtype) -> Any:
        """The model in `dtype`, in evaluation mode."""
        model = causal_of(self.base, dtype, self.device, self.held, nf4=self.nf4)
        return (model if self.adapter is None else PeftModel.from_pretrained(model, str(self.adapter))).eval()


def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits [T, V] of each prompt alone, float32 on the CPU."""
    with torch.inference_mode():
        return [model(torch.tensor([list(each)], device=model.device)).logits[0].float().cpu() for each in prompts]


def round_base(model: Any, dtype: torch.dtype) -> None:
    """Turn a float32 model, in place, into the one that loading in `dtype` gives: PEFT keeps adapters, and transformers
    its buffers, in float32. Not for 4-bit weights, which keep the type that they were quantised from."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)


def round_trip(
    scorer: ServingScorer,
    base: Path,
    adapter: Path | None,
    prompts: Sequence[Sequence[int]],
    limits: GateThresholds,
    *,
    held: HeldBase | None = None,
) -> RoundTrip:
    """The server's logits of the prompts against PEFT's, in the scorer's precision; without an adapter the base's."""
    served = scorer.base
    reference = Reference(base, adapter, served.device, served.quantized, held)
    model = reference.load(torch.float32)
    exact, rounded = logits_of(model, prompts), None
    rounds = served.dtype is not torch.float32
    if rounds and served.quantized:
        del model
        model = reference.load(served.dtype)
    elif rounds:
        round_base(model, served.dtype)
    if rounds:
        rounded = logits_of(model, prompts)
    precision = str(served.dtype).removeprefix("torch.")
    name = "nf4" if served.quantized and not rounds else precision
    scale = BASE_ALONE if adapter is None else 1.0
    return compare(scorer.logits(prompts, scale=scale), exact, rounded, limits, precision=name)
