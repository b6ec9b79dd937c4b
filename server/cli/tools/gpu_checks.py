"""`multilora doctor`'s look at a GPU's kernels: each operation against its reference on the device itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lora_kernels.self_test import OpCheck, self_test
from lora_kernels.triton_common.available import ENVIRONMENT, OPS, has_triton
from server.cli.tools.checks import Check, Level


def check_kernels() -> Iterator[Check]:
    """One line per operation; none without a GPU or Triton, which other checks tell."""
    if torch.cuda.is_available() and has_triton():
        yield from kernel_checks(self_test(torch.device("cuda")))


def kernel_checks(results: Sequence[OpCheck]) -> Iterator[Check]:
    """A wrong operation is a warning: torch serves it, slower."""
    for op in OPS:
        own = [result for result in results if result.op == op]
        wrong = [result for result in own if not result.is_ok]
        if wrong:
            advice = f"torch serves it, slower (as {ENVIRONMENT}={op} would have it); please report this device"
            yield Check(f"kernel: {op}", Level.WARN, wrong[0].text, advice)
        elif own:
            yield Check(f"kernel: {op}", Level.OK, f"{len(own)} cases equal their reference")
