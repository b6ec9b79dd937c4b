"""Which tensors and operations go to Triton, and how one is turned off."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.triton_common.available import TritonSwitch, on_triton


def test_cpu_tensors_keep_their_own_path() -> None:
    assert not on_triton(torch.empty(1), "lora")


def test_operations_are_turned_off_by_name() -> None:
    switch = TritonSwitch.from_text("lora, nf4")
    assert set(switch.off) == {"lora", "nf4"}
    assert not TritonSwitch.from_text("").off


def test_a_name_that_is_no_operation_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="among lora, attention, nf4, elementwise, got 'loar'"):
        TritonSwitch.from_text("loar")


def test_the_first_reason_is_kept() -> None:
    switch = TritonSwitch()
    switch.turn_off("lora", "first")
    switch.turn_off("lora", "second")
    assert switch.off["lora"] == "first"
