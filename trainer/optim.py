"""AdamW and its schedule. The learning rate is a function of the step alone, so there is no scheduler state to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.spec import OptimSpec

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def make_optimizer(weights: Sequence[nn.Parameter], optim: OptimSpec) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over all of `weights`, in one fused kernel: thousands of small factors cost one call."""
    return torch.optim.AdamW(
        weights, lr=optim.learning_rate, betas=BETAS, eps=EPSILON, weight_decay=optim.weight_decay, fused=True
    )


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
