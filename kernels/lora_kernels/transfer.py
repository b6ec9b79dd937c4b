"""Small host tensors on their way to a device, without making the host wait. Knows tensors only."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On a GPU through page-locked memory, which the allocator keeps until the copy has read it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
