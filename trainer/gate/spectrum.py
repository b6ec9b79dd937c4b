"""Measures an adapter's weights alone: finite, how large, how many directions. Knows matrices; no model.

The update of a layer is scale x B A. Its singular values come from two thin QR factorisations and one rank x rank SVD,
so the cost depends on the rank alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from trainer.gate.thresholds import GateThresholds
from trainer.gate.verdict import Reason

_SMALL_RANK = 4  # an effective rank of 1 of 2 is no collapse


@dataclass(frozen=True, eq=False)
class ModuleWeights:
    """One adapted layer. a: [rank, in_features], b: [out_features, rank], float32. base_norm: Frobenius, or None."""

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    base_norm: float | None = None


@dataclass(frozen=True)
class ModuleSpectrum:
    """singular_values: of scale x B A, falling. effective_rank: exp of their entropy (Roy and Vetterli, 2007).

    relative_norm: the update's Frobenius norm over the layer's own.
    """

    name: str
    rank: int
    scale: float
    singular_values: tuple[float, ...]
    effective_rank: float
    norm: float
    relative_norm: float | None

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.norm))

    def to_mapping(self) -> dict[str, object]:
        return asdict(self) if self.is_finite else {**asdict(self), "singular_values": None}


def spectrum_of(module: ModuleWeights) -> ModuleSpectrum:
    """Singular values and what follows from them; all NaN if a weight is not finite."""
    rank = module.a.shape[0]
    if not (torch.isfinite(module.a).all() and torch.isfinite(module.b).all()):
        return ModuleSpectrum(module.name, rank, module.scale, (np.nan,) * rank, np.nan, np.nan, None)
    right, left = torch.linalg.qr(module.a.T).R, torch.linalg.qr(module.b).R
    values = torch.linalg.svdvals(left @ right.T).double() * abs(module.scale)
    norm = float(values.square().sum().sqrt())
    return ModuleSpectrum(
        name=module.name,
        rank=rank,
        scale=module.scale,
        singular_values=tuple(values.tolist()),
        effective_rank=_effective_rank(values),
        norm=norm,
        relative_norm=norm / module.base_norm if module.base_norm else None,
    )


def _effective_rank(values: torch.Tensor) -> float:
    total = float(values.sum())
    if total == 0.0:
        return 0.0
    shares = values[values > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def judge_spectrum(modules: Sequence[ModuleSpectrum], limits: GateThresholds) -> list[Reason]:
    """The reasons against the adapter; none if there is none (a whole model was trained)."""
    if not modules:
        return []
    broken = [module.name for module in modules if not module.is_finite]
    if broken:
        message = f"{len(broken)} layers hold values that are not finite, the first is {broken[0]}"
        return [Reason("non_finite_weights", "block", message, len(broken), 0)]
    if not any(module.norm for module in modules):
        return [Reason("no_effect", "block", "every update is zero: the adapter is the base")]
    return [*_judge_size(modules, limits), *_judge_rank(modules, limits), *_judge_scale(modules, limits)]


def _judge_size(modules: Sequence[ModuleSpectrum], limits: GateThresholds) -> list[Reason]:
    known = [module for module in modules if module.relative_norm is not None]
    if not known:
        return []
    largest = max(known, key=lambda module: module.relative_norm or 0.0)
    size = largest.relative_norm or 0.0
    message = f"{largest.name}: the update is {size:,.1f} times as large as the weight it changes"
    if size > limits.relative_norm_block:
        return [Reason("exploding_norm", "block", message, size, limits.relative_norm_block)]
    if size > limits.relative_norm_warn:
        return [Reason("large_update", "warn", message, size, limits.relative_norm_warn)]
    return []


def _judge_rank(modules: Sequence[ModuleSpectrum], limits: GateThresholds) -> list[Reason]:
    moved = [module for module in modules if module.norm]  # no text may reach some experts
    shares = [module.effective_rank / module.rank for module in moved if module.rank >= _SMALL_RANK]
    share = float(np.median(shares)) if shares else 1.0
    floor = max(limits.collapse_share, 1.05 / max(module.rank for module in modules))
    if share >= floor:
        return []
    message = f"the median layer uses {share:.0%} of its rank: a smaller rank would be enough, or training went wrong"
    return [Reason("rank_collapse", "warn", message, share, floor)]


def _judge_scale(modules: Sequence[ModuleSpectrum], limits: GateThresholds) -> list[Reason]:
    odd = [module for module in modules if not limits.scale_low <= module.scale <= limits.scale_high]
    if not odd:
        return []
    limit = limits.scale_low if odd[0].scale < limits.scale_low else limits.scale_high
    message = (
        f"{odd[0].name}: alpha over rank is {odd[0].scale:g}, usual is {limits.scale_low:g} to {limits.scale_high:g}"
    )
    return [Reason("unusual_alpha", "warn", message, odd[0].scale, limit)]
