"""A folder whose weights are stored in 8-bit floats as a base: what its config says, and its values in bfloat16.

Two forms, as the hub's -FP8 folders and as compressed-tensors write them; both keep a scale beside each weight, for the
whole, a row, or a block. Activations, which some of these models quantise too, stay in the served type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adapters_store.base.converted.shards import copy_companions, opened_weights, write_shards
from adapters_store.base.families import UnsupportedBase
from adapters_store.base.folder import CONFIG, read_json, reading, weight_files

_SCALES = ("weight_scale_inv", "weight_scale")  # under the weight's own module
_LEFT_OUT = ("input_scale", "input_scale_ub", "activation_scale", "k_scale", "v_scale", "q_scale")
_STORED = "F8_E4M3"
_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PLAIN_BYTES = 2


@dataclass(frozen=True)
class Fp8Base:
    """A folder that `door.is_fp8`."""

    path: Path

    @property
    def stored(self) -> str:
        return "FP8"

    @property
    def does(self) -> str:
        return "FP8 weights, dequantised to bfloat16"

    @property
    def plain_bytes(self) -> int:
        """Of its weights in bfloat16."""
        return _PLAIN_BYTES * sum(math.prod(shape) for _, shape, _ in self._tensors())

    def refuse(self, reason: str) -> UnsupportedBase:
        """The error to raise."""
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
            plain = {name: _PLAIN_BYTES * math.prod(shape) for name, shape, _ in self._tensors()}
            write_shards(folder, plain, lambda name: self._weight(name, owner, blocks))

    def _tensors(self) -> Iterator[tuple[str, list[int], str]]:
        """Name, shape and stored type of every tensor that is no scale."""
        with reading(self.path, "the weights"):
            for file in weight_files(self.path):
                with safe_open(file, framework="pt") as stored:
                    for name in stored.keys():  # noqa: SIM118  (no mapping)
                        if name.rpartition(".")[2] not in (*_SCALES, *_LEFT_OUT):
                            part = stored.get_slice(name)
                            yield name, part.get_shape(), part.get_dtype()

    def _block(self, stored: Mapping[str, Any]) -> list[int] | None:
        """Rows and columns of a block with one scale, by the config; None: no weight has blocks."""
        if stored["quant_method"] != "compressed-tensors":
            return _sizes(stored.get("weight_block_size"))
        groups = stored.get("config_groups")
        weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
        for about in weights:
            if not isinstance(about, dict) or (about.get("num_bits"), about.get("type")) != (8, "float"):
                form = "" if not isinstance(about, dict) else f" ({about.get('num_bits')} bits, {about.get('type')})"
                raise self.refuse(f"compressed-tensors weights that are no 8-bit floats{form:.60}")
        found = [_sizes(about.get("block_structure")) for about in weights]
        return next((sizes for sizes in found if sizes), None)

    def _weight(self, name: str, owner: Mapping[str, Any], block: list[int] | None) -> torch.Tensor:
        weight: torch.Tensor = owner[name].get_tensor(name)
        if weight.dtype in _PLAIN:
            return weight.to(torch.bfloat16)
        if weight.dtype is not torch.float8_e4m3fn:
            raise self.refuse(f"{name} is stored as {str(weight.dtype).removeprefix('torch.')}, not as {_STORED}")
        module = name.rpartition(".")[0]
        scale = next((f"{module}.{ending}" for ending in _SCALES if f"{module}.{ending}" in owner), None)
        if scale is None or not name.endswith(".weight"):
            raise self.refuse(f"{name} is stored as {_STORED} without a scale ({' or '.join(_SCALES)})")
        factors = spread(owner[scale].get_tensor(scale).float(), weight.shape, block)
        if factors is None:
            sizes = f"{list(owner[scale].get_slice(scale).get_shape())} for {list(weight.shape)}"
            raise self.refuse(f"{scale} has the shape {sizes}, which is no scale for the whole, a row or a block")
        plain = (weight.float() * factors).to(torch.bfloat16)
        if not plain.isfinite().all():
            raise self.refuse(f"{name} has values that are not finite")
        return plain


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
