"""LongRoPE for a forward that holds many sequences: each row is rotated by the factors of its own sequence's length.

transformers has two sets of frequencies and chooses one for the whole forward, by the largest position in it: long ones
if a sequence is longer than the base's original context, short ones else. That is right for one sequence in one
forward, and for nothing else: not for a chunk of a prompt, not beside other sequences. Here the choice is made for each
row. Knows positions and lengths; knows no requests, no examples and no files.

Legend: T tokens of the forward.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

LONGROPE = "longrope"
_FIXED = "fixed"  # no type that transformers' update knows: the copy keeps the frequencies that it has


class RowRope(nn.Module):
    """In the place of a family's rotary module. own: that module, as transformers made it.

    last_positions_1T: int, for each token the last position of its sequence, whether that is in the forward or not.
    None: transformers' own choice, for a forward that holds one whole sequence and nothing else.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self.original_lengths = _original_lengths(own)
        self.last_positions_1T: Tensor | None = None
        self._short = _frozen_after(own, dict.fromkeys(self.original_lengths, 1))
        self._long = _frozen_after(own, {kind: length + 1 for kind, length in self.original_lengths.items()})

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin, each [1, T, rotated width], in x's dtype."""
        kind = {} if layer_type is None else {"layer_type": layer_type}
        if self.last_positions_1T is None or layer_type not in self.original_lengths:
            own: tuple[Tensor, Tensor] = self.own(x, position_ids, **kind)
            return own
        short, long = self._short(x, position_ids, **kind), self._long(x, position_ids, **kind)
        is_long_1T1 = (self.last_positions_1T >= self.original_lengths[layer_type])[..., None]
        return torch.where(is_long_1T1, long[0], short[0]), torch.where(is_long_1T1, long[1], short[1])


def choose_rope_by_row(model: nn.Module) -> RowRope | None:
    """Replace the model's rotary module, in place, if it is LongRoPE's. Returns the new one, or None."""
    assert not any(isinstance(module, RowRope) for module in model.modules()), "its rope is chosen by row already"
    for name, module in list(model.named_modules()):
        if _original_lengths(module):
            rope = RowRope(module)
            model.set_submodule(name, rope)
            return rope
    return None


def rope_switches(config: PretrainedConfig) -> tuple[int, ...]:
    """Lengths, rising: a sequence of more tokens than one of them has other keys than it had before."""
    lengths = _longrope_lengths(getattr(config, "rope_parameters", None) or {})
    return tuple(sorted({length for length in lengths.values() if length < config.max_position_embeddings}))


def _original_lengths(module: nn.Module) -> dict[str | None, int]:
    """The original context of each kind of layer (None: of all) that this rotary module serves with LongRoPE."""
    if not hasattr(module, "rope_type"):
        return {}
    config: Any = module.config
    return _longrope_lengths(config.rope_parameters)


def _longrope_lengths(parameters: Mapping[str, Any]) -> dict[str | None, int]:
    parts: dict[str | None, Mapping[str, Any]] = {
        kind: part for kind, part in parameters.items() if isinstance(part, Mapping)
    }
    parts = parts or {None: parameters}
    return {
        kind: int(part["original_max_position_embeddings"])
        for kind, part in parts.items()
        if part.get("rope_type") == LONGROPE
    }


@torch.no_grad()
def _frozen_after(own: nn.Module, lengths: Mapping[str | None, int]) -> nn.Module:
    """A copy with the frequencies that transformers' module gives itself for a sequence of this length."""
    rope = copy.deepcopy(own)
    probe = torch.zeros(1, 1, 1, device=next(rope.buffers()).device)
    for kind, length in lengths.items():
        positions = torch.full((1, 1), length - 1, device=probe.device)
        rope(probe, positions, **({} if kind is None else {"layer_type": kind}))
    rope.rope_type = _fixed(rope.rope_type, lengths)
    return rope


def _fixed(rope_type: Any, kinds: Mapping[str | None, int]) -> Any:
    if not isinstance(rope_type, Mapping):
        return _FIXED
    return {kind: _FIXED if kind in kinds else each for kind, each in rope_type.items()}
