"""AdamW and its schedule. The learning rate is a function of the step alone, so there is no scheduler state to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lora_kernels.process import compile_nothing
from trainer.spec import OptimSpec, SpecError

BETAS = (0.9, 0.999)
EPSILON = 1e-8
_EIGHT_BIT_STEP, _KEYS = "bitsandbytes::optimizer_update_8bit_blockwise", {"cpu": "CPU", "cuda": "CUDA"}


def make_optimizer(weights: Sequence[nn.Parameter], optim: OptimSpec) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over all of `weights`, in one fused kernel: thousands of small factors cost one call.

    With 8-bit moments (arXiv 2110.02861) by bitsandbytes, weight by weight. Raises SpecError where it cannot."""
    settings: dict[str, Any] = {
        "lr": optim.learning_rate,
        "betas": BETAS,
        "eps": EPSILON,
        "weight_decay": optim.weight_decay,
    }
    if optim.moments == "8bit":
        return _eight_bit(weights, settings)
    return torch.optim.AdamW(weights, **settings, fused=True)


def _eight_bit(weights: Sequence[nn.Parameter], settings: dict[str, Any]) -> torch.optim.Optimizer:
    if find_spec("bitsandbytes") is None:
        raise SpecError("optim.moments", "8bit", "float32 without the package bitsandbytes (multilora[nf4])")
    compile_nothing()
    from bitsandbytes.optim import AdamW8bit

    kind = weights[0].device.type
    if kind not in _KEYS or not torch._C._dispatch_has_kernel_for_dispatch_key(_EIGHT_BIT_STEP, _KEYS[kind]):
        raise SpecError("optim.moments", "8bit", f"float32: this bitsandbytes has no 8-bit step on {kind}")
    optimizer: torch.optim.Optimizer = AdamW8bit(weights, **settings)
    return optimizer


def learning_rate(step: int, num_steps: int, optim: OptimSpec) -> float:
    """The rate of optimizer step `step` (from 0) of num_steps: a linear rise, then the schedule's fall towards zero."""
    warmup = math.ceil(num_steps * optim.warmup_fraction)
    if step < warmup:
        return optim.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(num_steps - warmup, 1)
    if optim.schedule == "constant":
        return optim.learning_rate
    if optim.schedule == "linear":
        return optim.learning_rate * (1 - progress)
    return optim.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip(weights: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients down to a joint norm of at most max_norm; returns the norm before. Shards count as whole."""
    norm = nn.utils.clip_grad_norm_(weights, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
