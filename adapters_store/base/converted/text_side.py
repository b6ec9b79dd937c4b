"""The text side of a model of text and pictures as a base of its own: the same weights under the names of its family.

Asked with text alone, such a model computes what a plain one of the family does: positions of three axes are then one,
and nothing attends to pictures. What sees pictures is left out.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import transformers
from transformers import AutoConfig

from adapters_store.base.converted.shards import copy_companions, opened_weights, write_shards
from adapters_store.base.families import HEAD, TEXT_SIDES, UnsupportedBase, text_side_name
from adapters_store.base.folder import CONFIG, read_json, reading, refuse_pointers

_OF_PICTURES = ("visual.", "vision_tower.", "multi_modal_projector.")
_AXES = ("mrope_section", "mrope_interleaved")  # of positions, which are one for text
_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class TextSide:
    """A folder that `door.has_text_side`."""

    path: Path
    stored: ClassVar[str] = "text side"

    @property
    def does(self) -> str:
        return f"only its text side is served, as {self._architecture}, written"

    @property
    def plain_bytes(self) -> int:
        """Of the text side's weights, in the types that they are stored in."""
        return sum(self._sizes.values())

    def _refused(self, reason: str) -> UnsupportedBase:
        return UnsupportedBase(f"--base {self.path}: {reason}")

    def write(self, folder: Path) -> None:
        """The text side in `folder`. Raises UnsupportedBase, OSError."""
        refuse_pointers(self.path)
        sizes = self._sizes
        (folder / CONFIG).write_text(json.dumps(self._config(is_tied=f"{HEAD}.weight" not in sizes), indent=2))
        copy_companions(self.path, folder)
        with opened_weights(self.path) as owner:
            stored = {_own_name(name): name for name in owner}
            write_shards(folder, sizes, lambda name: owner[stored[name]].get_tensor(stored[name]))

    @property
    def _architecture(self) -> str:
        return TEXT_SIDES[read_json(self.path / CONFIG)["architectures"][0]]

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """The text side's tensors by their own names, in bytes."""
        sizes: dict[str, int] = {}
        with opened_weights(self.path) as owner:
            for name, file in owner.items():
                own, part = _own_name(name), file.get_slice(name)
                if own.startswith(_OF_PICTURES):
                    continue
                if part.get_dtype() not in _BYTES:
                    raise self._refused(f"{name} is stored as {part.get_dtype()}; served are {', '.join(_BYTES)}")
                sizes[own] = _BYTES[part.get_dtype()] * math.prod(part.get_shape())
        return sizes

    def _config(self, *, is_tied: bool) -> dict[str, Any]:
        if read_json(self.path / CONFIG).get("quantization_config"):
            reason = "a quantised model of text and pictures; take the unquantised one that it was made from"
            raise self._refused(reason)
        with reading(self.path, CONFIG):
            outer = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
            text: dict[str, Any] = outer.get_text_config().to_dict()
        rope = text.get("rope_parameters")
        if isinstance(rope, dict) and "mrope_section" in rope:
            text["rope_parameters"] = {key: value for key, value in rope.items() if key not in _AXES}
        found: Any = getattr(transformers, self._architecture)
        return {
            **text,
            "architectures": [self._architecture],
            "model_type": found.config_class.model_type,
            "tie_word_embeddings": is_tied,
        }


def _own_name(name: str) -> str:
    """Of a part that sees pictures: a name that begins with one of `_OF_PICTURES`."""
    inner = name.removeprefix("model.")
    return inner if inner.startswith(_OF_PICTURES) else text_side_name(name)
