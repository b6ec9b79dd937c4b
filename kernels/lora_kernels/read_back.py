"""Small results on their way from a device to the host, for which the host waits only when it reads them. Knows tensors
only."""

from __future__ import annotations

import torch


class ReadBack:
    """Copies that begin where the device's queue stands now, and later work on that device does not change."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        """tensors: written once and read by nobody else; on a CPU they are handed back as they are."""
        self._on_host = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # from a GPU: page-locked
        self._arrived: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[torch.Tensor]:
        """The tensors on the host, in order, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._on_host
