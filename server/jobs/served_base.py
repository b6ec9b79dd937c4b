"""Which base is served, and how: jobs train on it, and the gate measures with it. Knows no database."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServedBase:
    """path: the base's folder. name: its id for clients. dtype, quantize, device: as `multilora serve` takes them."""

    path: Path
    name: str
    digest: str
    dtype: str = "auto"
    quantize: str | None = None
    device: str = "auto"
