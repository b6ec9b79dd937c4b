"""Tells a device that has failed from a request's own failure. Knows torch's device; ends nothing.

After an illegal address, a failed assertion in a kernel or a lost GPU, CUDA answers every later call of the process
with the same error. A request's own failure, too little memory among them, leaves a device that answers.
"""

from __future__ import annotations

import torch


class DeviceLost(RuntimeError):
    """No later call on the device can succeed: only a new process can serve."""


def device_error(device: torch.device) -> str | None:
    """Why no later call on the device can succeed; None: it answers. Waits for what was launched."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:  # torch.AcceleratorError among them
        return str(error).strip().partition("\n")[0]
    return None
