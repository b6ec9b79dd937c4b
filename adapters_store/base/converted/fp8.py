"""A folder whose weights are stored in 8-bit floats as a base: what its config says, and its values in bfloat16.

Two forms, as the hub's -FP8 folders and as compressed-tensors write them; both keep a scale beside each weight, for the
whole, a row, or a block. Activations, which some of these models quantise too, stay in the served type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from adapters_store.base.converted.shards import copy_companions, opened_weights, write_shards
from adapters_store.base.families import UnsupportedBase
from adapters_store.base.folder import CONFIG, read_json

_SCALES = ("weight_scale_inv", "weight_scale")  # under the weight's own module
_LEFT_OUT = ("input_scale", "input_scale_ub", "activation_scale", "k_scale", "v_scale", "q_scale")
_STORED = "F8_E4M3"
_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PLAIN_BYTES = 2


@dataclass(frozen=True)
class Fp8Base:
    """A folder that `door.is_fp8`."""

    path: Path
    stored: ClassVar[str] = "FP8"
    does: ClassVar[str] = "FP8 weights, dequantised to bfloat16"

    @property
    def plain_bytes(self) -> int:
        """Of its weights in bfloat16."""
        with opened_weights(self.path) as owner:
            return sum(_plain_sizes(owner).values())

    def _refused(self, reason: str) -> UnsupportedBase:
        return UnsupportedBase(f"--base {self.path}: {reason}")

    def write(self, folder: Path) -> None:
        """The same base, plain, in `folder`. Raises UnsupportedBase, OSError."""
        config = read_json(self.path / CONFIG)
        blocks = self._block(config["quantization_config"])
        for name in ("quantization_config", "torch_dtype"):
            config.pop(name, None)
        (folder / CONFIG).write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2, sort_keys=True))
        copy_companions(self.path, folder)
        with opened_weights(self.path) as owner:
            write_shards(folder, _plain_sizes(owner), lambda name: self._weight(name, owner, blocks))

    def _block(self, stored: Mapping[str, Any]) -> list[int] | None:
        """Rows and columns of a block with one scale, by the config; None: no weight has blocks."""
        if stored["quant_method"] != "compressed-tensors":
            return _sizes(stored.get("weight_block_size"))
        groups = stored.get("config_groups")
        weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
        for about in weights:
            if not isinstance(about, dict) or (about.get("num_bits"), about.get("type")) != (8, "float"):
                form = "" if not isinstance(about, dict) else f" ({about.get('num_bits')} bits, {about.get('type')})"
                raise self._refused(f"compressed-tensors weights that are no 8-bit floats{form:.60}")
        found = [_sizes(about.get("block_structure")) for about in weights]
        return next((sizes for sizes in found if sizes), None)

    def _weight(self, name: str, owner: Mapping[str, Any], block: list[int] | None) -> torch.Tensor:
        weight: torch.Tensor = owner[name].get_tensor(name)
        if weight.dtype in _PLAIN:
            return weight.to(torch.bfloat16)
        if weight.dtype is not torch.float8_e4m3fn:
            raise self._refused(f"{name} is stored as {str(weight.dtype).removeprefix('torch.')}, not as {_STORED}")
        module = name.rpartition(".")[0]
        scale = next((f"{module}.{ending}" for ending in _SCALES if f"{module}.{ending}" in owner), None)
        if scale is None or not name.endswith(".weight"):
            raise self._refused(f"{name} is stored as {_STORED} without a scale ({' or '.join(_SCALES)})")
        factors = spread(owner[scale].get_tensor(scale).float(), weight.shape, block)
        if factors is None:
            sizes = f"{list(owner[scale].get_slice(scale).get_shape())} for {list(weight.shape)}"
            raise self._refused(f"{scale} has the shape {sizes}, which is no scale for the whole, a row or a block")
        plain = (weight.float() * factors).to(torch.bfloat16)
        if not plain.isfinite().all():
            raise self._refused(f"{name} has values that are not finite")
        return plain


def _plain_sizes(owner: Mapping[str, Any]) -> dict[str, int]:
    """Bytes in bfloat16 of every tensor that is no scale. owner: the open file that holds each tensor."""
    names = (name for name in owner if name.rpartition(".")[2] not in (*_SCALES, *_LEFT_OUT))
    return {name: _PLAIN_BYTES * math.prod(owner[name].get_slice(name).get_shape()) for name in names}


def _sizes(value: object) -> list[int] | None:
    is_pair = isinstance(value, list) and len(value) == 2 and all(type(item) is int and item > 0 for item in value)
    return list(value) if is_pair else None  # type: ignore[call-overload]


def spread(scale: torch.Tensor, shape: torch.Size, block: list[int] | None) -> torch.Tensor | None:
    """The scales of a weight [O, H], as a tensor that multiplies it; None if they fit no form.

    scale: one value; [O] or [O, 1], a row each; or [ceil(O / rows), ceil(H / columns)] of a block.
    """
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.shape in ((shape[0],), (shape[0], 1)):
        return scale.reshape(-1, 1)
    if block is None or list(scale.shape) != [-(-size // step) for size, step in zip(shape, block, strict=True)]:
        return None
    rows = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]
