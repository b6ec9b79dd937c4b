"""Replaces CUDA graphs without a GPU: a replay runs the recorded function again, over the same memory."""

from __future__ import annotations

from collections.abc import Callable

import torch


class EagerCapture:
    """The seam's contract: run once, then every replay writes its result into one and the same tensor."""

    def __init__(self) -> None:
        self.num_replays = 0

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        output = run()

        def replay() -> torch.Tensor:
            self.num_replays += 1
            assert run().data_ptr() == output.data_ptr(), "a replay writes where the recording wrote"
            return output

        return replay
