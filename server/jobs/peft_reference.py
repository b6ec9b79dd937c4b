"""The round trip's other side: transformers and PEFT on the same base and adapter. Knows models; compares nothing.

One model at a time is in memory, so a check in bfloat16 costs two loads and not two models at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapters_store.base_nf4 import keep_nf4_weights_plain, nf4_config
from server.jobs.serving_scorer import ServingScorer
from trainer.gate.round_trip import RoundTrip, compare
from trainer.gate.scorer import BASE_ALONE
from trainer.gate.thresholds import GateThresholds


def peft_logits(
    base: Path,
    adapter: Path | None,
    prompts: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    nf4: bool,
    device: torch.device,
) -> list[torch.Tensor]:
    """Logits [T, V] of each prompt alone, float32 on the CPU; without an adapter the base's."""
    options: dict[str, Any] = {"quantization_config": nf4_config(dtype)} if nf4 else {}
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        local_files_only=True,
        device_map={"": str(device)} if nf4 or device.type == "cuda" else None,
        **options,
    )
    keep_nf4_weights_plain(model)
    model = (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()
    with torch.inference_mode():
        return [model(torch.tensor([list(prompt)], device=device)).logits[0].float().cpu() for prompt in prompts]


def round_trip(
    scorer: ServingScorer, base: Path, adapter: Path | None, prompts: Sequence[Sequence[int]], limits: GateThresholds
) -> RoundTrip:
    """The server's logits of the prompts against PEFT's, in the scorer's precision; without an adapter the base's."""
    served = scorer.base
    reference = partial(peft_logits, base, adapter, prompts, nf4=served.quantized, device=served.device)
    exact = reference(dtype=torch.float32)
    rounds = served.dtype is not torch.float32
    rounded = reference(dtype=served.dtype) if rounds else None
    precision = str(served.dtype).removeprefix("torch.")
    name = "nf4" if served.quantized and not rounds else precision
    scale = BASE_ALONE if adapter is None else 1.0
    return compare(scorer.logits(prompts, scale=scale), exact, rounded, limits, precision=name)
