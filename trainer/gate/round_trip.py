"""Whether the server computes what PEFT computes with the same adapter. Knows logits; runs no model.

Exact precisions are compared directly. In bfloat16 two correct programs differ, so both are compared with float32, and
the server may be a little further from it than PEFT is in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer.gate.thresholds import GateThresholds
from trainer.gate.verdict import Reason


@dataclass(frozen=True)
class RoundTrip:
    """difference: compared with `limit`, in `unit`. Infinite if logits are not finite."""

    precision: str
    difference: float
    limit: float
    unit: str
    num_prompts: int


def compare(
    ours: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    rounded: Sequence[torch.Tensor] | None,
    limits: GateThresholds,
    *,
    precision: str,
) -> RoundTrip:
    """Logits [T, V] per prompt, float32. exact: PEFT's. rounded: PEFT's in the serving precision if that rounds.

    precision: "float32", "nf4" (exact is PEFT on the same 4-bit base), or "bfloat16".
    """
    if rounded is None:
        limit = limits.tolerance_nf4 if precision == "nf4" else limits.tolerance_float32
        worst = max(_largest(a, b) for a, b in zip(ours, exact, strict=True))
        return RoundTrip(precision, worst, limit, "largest logit difference", len(ours))
    ratio = _error(ours, exact) / max(_error(rounded, exact), torch.finfo(torch.float32).eps)
    return RoundTrip(precision, _known(ratio), limits.tolerance_bfloat16, "times PEFT's own error", len(ours))


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return _known(float((a - b).abs().max()) / max(1.0, float(b.abs().max())))


def _error(some: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    squares = sum(float((a - b).double().square().mean()) for a, b in zip(some, exact, strict=True))
    return math.sqrt(squares / len(some))


def _known(value: float) -> float:
    return float("inf") if math.isnan(value) else value


def judge_round_trip(found: RoundTrip) -> list[Reason]:
    """The reasons against the adapter."""
    if found.difference <= found.limit:
        return []
    message = f"served logits are not PEFT's: {found.unit} {found.difference:.3g} in {found.precision}"
    return [Reason("round_trip", "block", message, found.difference, found.limit)]
