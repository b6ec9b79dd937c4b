"""Prints a digest of what the C kernels compute: `python -m support.kernels.native_bits`, with the compiler in $CC."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from lora_kernels import check_cases
from lora_kernels.lora.batch import LoraGroup
from lora_kernels.lora.launcher import expert_linear, group_linear, has_expert_kernel
from lora_kernels.native.build import native_build
from lora_kernels.self_test import self_test


def main() -> None:
    build = native_build()
    assert build.library is not None, build.reason
    found = hashlib.sha256()

    def note(got: torch.Tensor, _: torch.Tensor | None = None) -> float:
        found.update(got.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return 0.0

    check_cases.relative_error = note
    for dtype in (torch.float32, torch.bfloat16):
        failures = [check.failure for check in self_test(torch.device("cpu"), dtype) if check.failure]
        assert failures == []
        for in_features, out in ((97, 33), (258, 352)):
            generator = torch.Generator().manual_seed(out)
            weight = torch.randn(4, out, in_features, generator=generator).to(dtype)
            x = torch.randn(52, in_features, generator=generator).to(dtype)
            group = LoraGroup((0,), in_features, (out,))
            for num_rows in (1, 2, 3, 8, 9, 40):
                note(group_linear(x[:num_rows], weight[0], None, None, group))
            if has_expert_kernel(x):
                note(expert_linear(x, weight, np.array([0, 1, 4, 12, 52]), None, group))
    print(found.hexdigest())


if __name__ == "__main__":
    main()
