"""Small tensors between host and device, copied without making the host wait. Knows tensors only."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On a GPU through page-locked memory, which the allocator keeps until the copy has read it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class ReadBack:
    """Small results on their way to the host, queued behind the device's work so far. The host waits only in `read`."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        """tensors: not written again and not read elsewhere; on a CPU `read` returns them unchanged."""
        self._on_host = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # from a GPU: page-locked
        self._arrived: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[torch.Tensor]:
        """The tensors on the host, in order. Waits for the copies."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._on_host
