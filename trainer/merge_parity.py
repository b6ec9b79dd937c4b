"""Whether merged weights answer as base and adapter do: logits on fixed random tokens, PEFT as the oracle.

Both sides compute in float32, so that what is left is what storing the sum in its type has cost. Knows folders and
models; knows no merging. One whole model is in memory at a time, 4 bytes a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from adapters_store.base.nf4 import keep_nf4_weights_plain
from adapters_store.base.weights import load_causal

# Largest relative error of logits (root mean square) by the type in which sums are stored: a few units in its last
# place, as they add up over layers.
TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
MAX_LOST = 0.25  # a small adapter's sum can vanish in bfloat16's rounding although the logits hardly differ
NUM_PROBES, PROBE_TOKENS = 4, 48


@dataclass(frozen=True)
class Parity:
    """error: rms(merged - apart) / rms(apart) of logits. effect: rms(apart - base alone) / rms(apart), how much the
    adapter changes at all. lost: error / effect. agreement: share of positions with the same likeliest token."""

    error: float
    tolerance: float
    largest: float
    effect: float
    agreement: float

    @property
    def lost(self) -> float:
        return self.error / self.effect if self.effect else 0.0

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance and self.lost <= MAX_LOST

    def __str__(self) -> str:
        differ = (
            f"logits differ by {self.error:.2e} relative (tolerance {self.tolerance:.0e}), {self.largest:.2e} at most"
        )
        lost = f"{self.effect:.2e}, of which {self.lost:.1%} is lost (at most {MAX_LOST:.0%})"
        same = f"the likeliest token is the same at {self.agreement:.1%} of the positions"
        return f"{differ}; the adapter itself changes them by {lost}; {same}"


def compare_merged(base: Path, adapter: Path, merged: Path, dtype: str) -> Parity:
    """Base and adapter apart against the merged folder. dtype: in which the sums are stored."""
    ids, wanted, bare = _apart(PeftModel.from_pretrained(_load(base), adapter).eval())
    return _parity(_logits(_load(merged), ids), wanted, bare, TOLERANCES[dtype])


def compare_requantised(base: Path, adapter: Path) -> Parity:
    """An NF4 base and the adapter apart against the sum rounded to NF4 again, as PEFT does it."""
    quantised = load_causal(base, torch.float32, torch.device("cpu"), nf4=True)
    model: Any = PeftModel.from_pretrained(quantised, adapter).eval()
    ids, wanted, bare = _apart(model)
    merged = model.merge_and_unload()
    keep_nf4_weights_plain(merged)
    return _parity(_logits(merged, ids), wanted, bare, TOLERANCES["bfloat16"])


def _apart(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, the same for every merge of a vocabulary; the logits of base and adapter; those of the base."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (NUM_PROBES, PROBE_TOKENS), generator=random)
    wanted = _logits(model, ids)
    with model.disable_adapter():
        return ids, wanted, _logits(model, ids)


def _parity(merged: Tensor, wanted: Tensor, bare: Tensor, tolerance: float) -> Parity:
    scale, difference = _rms(wanted), (merged - wanted).abs()
    return Parity(
        error=_rms(difference) / scale,
        tolerance=tolerance,
        largest=float(difference.max()),
        effect=_rms(wanted - bare) / scale,
        agreement=float((merged.argmax(-1) == wanted.argmax(-1)).float().mean()),
    )


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _load(folder: Path) -> Any:
    return load_causal(folder, torch.float32, torch.device("cpu")).eval()


@torch.inference_mode()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits
