"""`multilora` on a device that fails for good at a forward: from then on every call on it raises, as CUDA's do.

`python failing_device.py ARGUMENTS`. The device is a CPU; what stands in for CUDA is the error and the synchronisation.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

MESSAGE = "CUDA error: device-side assert triggered"
FAILS_AT = 30  # forwards of the engine


class FailingDevice:
    """calls_left: forwards that succeed. is_sticky: CUDA's synchronisation fails from then on, too."""

    def __init__(self, calls_left: int, *, is_sticky: bool = True) -> None:
        self.calls_left = calls_left
        self.is_sticky = is_sticky

    def call(self) -> None:
        self.calls_left -= 1
        if self.calls_left < 0:
            self.fail()

    def fail(self) -> NoReturn:
        raise torch.AcceleratorError(f"{MESSAGE}\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.")

    def synchronize(self, device: Any = None) -> None:
        if self.calls_left < 0 and self.is_sticky:
            self.fail()

    def under(self, patch: Any, runner: Any) -> None:
        """Forwards of the runner, a class or one object, run on this device."""
        for name in ("launch", "run"):
            patch(runner, name, self._calling(getattr(runner, name)))
        patch(torch.cuda, "synchronize", self.synchronize)

    def _calling(self, forward: Any) -> Any:
        def called(*args: Any) -> Any:
            self.call()
            return forward(*args)

        return called


def main() -> None:
    from server.cli.main import app
    from server.engine.device_fault import device_error
    from server.engine.model.runner import ModelRunner
    from server.engine.startup import build

    FailingDevice(FAILS_AT).under(setattr, ModelRunner)
    build.device_error = lambda device: device_error(torch.device("cuda"))  # type: ignore[attr-defined]
    app()


if __name__ == "__main__":
    main()
