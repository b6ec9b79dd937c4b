"""Where the blobs are: what an operator sets, and what a process hands to its workers. Imports nothing heavy."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

MIB = 1 << 20
CACHE_MIB = 16_384
GRACE_S = 86_400.0
URL_VARIABLE = "MULTILORA_BLOB_URL"
CACHE_VARIABLE = "MULTILORA_BLOB_CACHE_MIB"


@dataclass(frozen=True, kw_only=True)
class RemoteSettings:
    """url: s3://BUCKET/PREFIX, gs://, az:// or file://. cache_mib: of the local disk. grace_s: how long a blob stays
    in the object store that no row names."""

    url: str
    cache_mib: float = CACHE_MIB
    grace_s: float = GRACE_S

    def __post_init__(self) -> None:
        if not 0 < self.cache_mib < math.inf:
            raise ValueError(f"{CACHE_VARIABLE} must be a number above 0, got {self.cache_mib}")
        if not self.grace_s >= 0:
            raise ValueError(f"grace_s must be at least 0, got {self.grace_s}")

    @property
    def cache_bytes(self) -> int:
        return int(self.cache_mib * MIB)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RemoteSettings | None:
        """None without a URL. Raises ValueError."""
        url = environment.get(URL_VARIABLE)
        if not url:
            return None
        cache = environment.get(CACHE_VARIABLE) or CACHE_MIB
        try:
            return cls(url=url, cache_mib=float(cache))
        except ValueError:
            raise ValueError(f"{CACHE_VARIABLE} must be a number above 0, got {str(cache)[:40]!r}") from None

    def to_environment(self) -> dict[str, str]:
        return {URL_VARIABLE: self.url, CACHE_VARIABLE: f"{self.cache_mib:g}"}
