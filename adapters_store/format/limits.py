"""How large an uploaded adapter may be. Knows numbers only; the code that uses a number refuses."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

TENSORS_OF_EXPERT = 4  # A and B of gate and up, which are one parameter
HEADER_BYTES_OF_TENSOR = 256


@dataclass(frozen=True, kw_only=True)
class AdapterLimits:
    """Upper bounds on one upload, and on one tenant. Bytes are file bytes.

    max_header_bytes and max_tensors hold 126 layers x 7 modules x 2 tensors with room to spare; a header of 200,000
    tensors is refused from its length alone.
    """

    max_rank: int = 256
    max_bytes: int = 1 << 30
    max_tensors: int = 4096
    max_header_bytes: int = 1 << 20
    max_config_bytes: int = 1 << 20
    max_tensor_name_chars: int = 512
    max_versions_per_tenant: int = 100_000

    def with_experts(self, count: int) -> AdapterLimits:
        """For a base whose layers' parameters have `count` experts in all: each may have four tensors of its own."""
        return replace(
            self,
            max_tensors=self.max_tensors + TENSORS_OF_EXPERT * count,
            max_header_bytes=self.max_header_bytes + TENSORS_OF_EXPERT * HEADER_BYTES_OF_TENSOR * count,
        )

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) <= 0:
                raise ValueError(f"{item.name} must be positive, got {getattr(self, item.name)}")
