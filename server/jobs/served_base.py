"""Which base is served, and how: jobs train on it, and the gate measures with it. Knows no database."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ServedBase:
    """path: the base's folder. name: its id for clients. dtype, quantize, device: as `multilora serve` takes them."""

    path: Path
    name: str
    digest: str
    dtype: str = "auto"
    quantize: str | None = None
    device: str = "auto"

    @property
    def training_precision(self) -> Literal["float32", "bfloat16"]:
        """In which a job trains if nothing else is asked for: on a GPU as the base is served. Many CPUs have no
        instructions for bfloat16, and a step then takes several times as long as in float32."""
        return "bfloat16" if self.device == "cuda" and self._dtype == "bfloat16" else "float32"

    @property
    def _dtype(self) -> str:
        if self.dtype != "auto":
            return self.dtype
        try:
            config = json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError):  # the trainer says what is wrong with it
            return "float32"
        return str(config.get("dtype") or config.get("torch_dtype") or "float32")
