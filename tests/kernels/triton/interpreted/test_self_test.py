"""The self-test passes where kernels are right, names the one that is not, and has torch serve it."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import self_test as self_tests
from lora_kernels.lora import triton_launch as lora
from lora_kernels.lora.batch import LoraGroup
from lora_kernels.self_test import OpCheck, self_test, turn_off_failing
from lora_kernels.triton_common.available import OPS, Op, on_triton, triton_switch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_switch(), "on_cpu", True)
    monkeypatch.setattr(triton_switch(), "_off", {})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections that are computed quickly: a fault shows in them too."""
    monkeypatch.setattr(self_tests, "GROUP", LoraGroup((0, 1, 2), 96, (40, 16, 24)))
    monkeypatch.setattr(self_tests, "RANKS", (16, 1, 3, 8, 32, 64))


@pytest.mark.parametrize("op", OPS)
def test_every_operation_passes_its_own_cases(op: Op) -> None:
    checks = self_test(CPU, torch.bfloat16, [op])
    assert len(checks) >= 2
    assert [check.text for check in checks if not check.is_ok] == []


@pytest.mark.usefixtures("small")
def test_a_wrong_kernel_is_named_and_torch_serves_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lora._shrink

    def wrong(x: torch.Tensor, shared: lora._Shared, tile: lora.LoraTile) -> None:
        right(x, shared, tile)
        shared.h[-16:] *= 1.5

    monkeypatch.setattr(lora, "_shrink", wrong)
    lines = turn_off_failing(self_test(CPU, torch.bfloat16, ["lora"]))
    assert lines
    assert all(line.startswith("lora (") for line in lines)
    assert not on_triton(torch.empty(1), "lora")
    assert on_triton(torch.empty(1), "attention")
    assert [check.is_ok for check in self_test(CPU, torch.bfloat16, ["lora"])] == [True] * 4


def test_a_kernel_that_does_not_run_is_turned_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: torch.Tensor, shared: lora._Shared, tile: lora.LoraTile) -> None:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    monkeypatch.setattr(lora, "_shrink", broken)
    checks = self_test(CPU, torch.bfloat16, ["lora"])
    assert checks[0] == OpCheck("lora", checks[0].case, None, "RuntimeError: out of resource: shared memory")
    turn_off_failing(checks)
    assert "out of resource" in triton_switch().off["lora"]


@pytest.mark.usefixtures("small")
def test_nan_is_never_near_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "_expand", lambda y, shared, tile: y.fill_(torch.nan))
    assert not any(check.is_ok for check in self_test(CPU, torch.bfloat16, ["lora"]))
