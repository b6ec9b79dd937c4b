"""What `doctor` says of a GPU's kernels."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.check_cases import Outcome
from lora_kernels.self_test import OpCheck
from server.cli.tools.checks import Level, check_kernels, kernel_checks


def test_each_operation_is_one_line_and_a_wrong_one_says_how_wrong() -> None:
    right, wrong = Outcome(0.001, 0.002), Outcome(0.5, 0.002)
    results = [
        OpCheck("lora", "decode", right),
        OpCheck("lora", "prefill", wrong),
        OpCheck("attention", "window", right),
        OpCheck("nf4", "1 row", None, "RuntimeError: out of resource"),
    ]
    lora, attention, nf4 = kernel_checks(results)
    assert (lora.level, lora.found) == (Level.WARN, "lora (prefill): error 0.5, at most 0.002")
    assert "MULTILORA_TORCH_OPS=lora" in lora.advice
    assert (attention.name, attention.level) == ("kernel: attention", Level.OK)
    assert nf4.found == "nf4 (1 row): RuntimeError: out of resource"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_said_without_a_gpu() -> None:
    assert list(check_kernels()) == []
