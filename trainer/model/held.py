"""A base in memory for more than one run: a resident process reads it, and each of its forks begins with it.

A fork may change what it finds here: it is the fork's own. Weights that no fork writes to are in memory once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from adapters_store.base.files import describe_base
from adapters_store.base.tokenizer import load_tokenizer
from adapters_store.base.weights import load_causal

CPU = torch.device("cpu")
State = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, eq=False)
class HeldBase:
    """folder: as a spec names it. state: of its files before they were read. causal: transformers' model, in `dtype` on
    the CPU, with transformers' own attention. packing_difference: of the proof that packing changes nothing, if it was
    made on this base."""

    folder: Path
    dtype: torch.dtype
    state: State
    digest: str
    tokenizer: Any
    causal: Any
    packing_difference: float | None = None

    @classmethod
    def read(cls, folder: Path, dtype: torch.dtype) -> Self:
        """Raises UnsupportedBase, OSError."""
        state = _state_of(folder)
        digest = describe_base(folder).digest
        return cls(folder, dtype, state, digest, load_tokenizer(folder), load_causal(folder, dtype, CPU))

    @property
    def float32_bytes(self) -> int:
        """Of the base's weights, if they were in float32."""
        return sum(4 * weight.numel() for weight in self.causal.parameters())

    def is_of(self, folder: Path) -> bool:
        """Whether it is what reading the folder again would give."""
        return folder == self.folder and self.state == _state_of(folder)


def tokenizer_of(folder: Path, held: HeldBase | None) -> Any:
    """As load_tokenizer."""
    return held.tokenizer if held is not None and held.is_of(folder) else load_tokenizer(folder)


def causal_of(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    held: HeldBase | None,
    *,
    nf4: bool = False,
    attention: str | None = None,
) -> Any:
    """As load_causal; attention: the name of an implementation. What is held is given away: ask for it once."""
    if nf4 or device != CPU or held is None or held.dtype is not dtype or not held.is_of(folder):
        options = {} if attention is None else {"attn_implementation": attention}
        return load_causal(folder, dtype, device, nf4=nf4, **options)
    if attention is not None:
        held.causal.set_attn_implementation(attention)
    return held.causal


def _state_of(folder: Path) -> State:
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
