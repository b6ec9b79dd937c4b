"""How long a run takes and what it costs, from operations, bytes on the link and an assumed share of the peak.

Operations: 2 per weight forward, 4 backward (Kaplan et al. 2020, arXiv 2001.08361, 2.1); a frozen weight needs no
gradient of its own, so 2 + 2; recomputation adds a forward. Attention after Chowdhery et al. 2022 (arXiv 2204.02311,
appendix B), halved because it is causal. Link: ZeRO's volumes (arXiv 1910.02054, section 7), overlapped with computing.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.planner.gpus import Gpu
from trainer.planner.memory import Method, TrainingCase

# Share of the peak that a tuned run reaches; adapters add small products, NF4 is unpacked before each product.
UTILISATION: dict[Method, float] = {"full": 0.40, "lora": 0.35, "dora": 0.25, "qlora": 0.25}


@dataclass(frozen=True)
class RunTime:
    """One run on `devices` devices. bound: what sets the pace, "compute" or "link"."""

    hours: float
    usd: float
    tokens_per_s: float
    bound: str
    assumptions: tuple[str, ...]


def flops_per_token(case: TrainingCase, sequence_length: int) -> float:
    """Operations of one step for one token, forward and backward."""
    weights = case.shape.multiplied_parameters
    attention = 2 * case.shape.layers * case.shape.heads * case.shape.head_dim * sequence_length
    trained = 0 if case.method == "full" else case.trained_parameters
    forward = 2 * (weights + trained) + attention
    backward = (4 if case.method == "full" else 2) * weights + 4 * trained + 2 * attention
    return forward * (2 if case.checkpointing else 1) + backward


def link_bytes_per_forward(case: TrainingCase) -> float:
    """What each device sends for one forward and backward."""
    devices = case.sharding.devices
    passed_on = (devices - 1) / devices
    weights = case.frozen_bytes + case.trained_parameters * case.optimizer_state.weight
    gathered = 2 * weights if case.sharding.stage == 3 else 0  # before the forward, and again before the backward
    reduced = (1 if case.sharding.stage >= 2 else 2) * case.trained_parameters * case.optimizer_state.gradient
    return passed_on * (gathered + reduced)


def run_time(
    case: TrainingCase, gpu: Gpu, *, train_tokens: int, sequence_length: int, utilisation: float | None = None
) -> RunTime:
    """train_tokens: all tokens of all epochs, over all devices. utilisation: share of the peak, 0 to 1."""
    share, devices = utilisation or UTILISATION[case.method], case.sharding.devices
    work = flops_per_token(case, sequence_length)
    computing_s = train_tokens * work / (gpu.flops * share * devices)
    forwards = train_tokens / (case.tokens * devices)
    sending_s = forwards * link_bytes_per_forward(case) / gpu.link_bytes_per_s
    hours = max(computing_s, sending_s) / 3600
    return RunTime(
        hours=hours,
        usd=hours * devices * gpu.usd_per_hour,
        tokens_per_s=train_tokens / (hours * 3600),
        bound="link" if sending_s > computing_s else "compute",
        assumptions=(
            f"{share:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s ({gpu.name}, dense bfloat16)",
            f"USD {gpu.usd_per_hour:.2f} an hour and device",
            "evaluation, checkpoints and start not counted",
        ),
    )
