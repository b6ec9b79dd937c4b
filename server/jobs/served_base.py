"""Which base is served, and how: jobs train on it, and the gate measures with it. A small file in the data directory,
so that jobs can be created and run whether or not the server runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters_store.storage.filesystem import Filesystem

FILE_NAME = "served-base.json"


@dataclass(frozen=True, kw_only=True)
class ServedBase:
    """path: the base's folder. name: its id for clients. dtype, quantize, device: as `multilora serve` takes them."""

    path: Path
    name: str
    digest: str
    dtype: str = "auto"
    quantize: str | None = None
    device: str = "auto"

    def remember(self, data_dir: Path) -> None:
        """Write the record, whole or not at all."""
        body = {**asdict(self), "path": str(self.path.resolve())}
        Filesystem().write_atomic(data_dir / FILE_NAME, json.dumps(body).encode(), durable=False)

    @classmethod
    def recall(cls, data_dir: Path) -> ServedBase | None:
        """The base served last from this data directory; None if there was none."""
        try:
            body: dict[str, Any] = json.loads((data_dir / FILE_NAME).read_text())
        except FileNotFoundError:
            return None
        return cls(**{**body, "path": Path(body["path"])})
