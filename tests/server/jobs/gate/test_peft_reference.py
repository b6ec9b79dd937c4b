"""A model that is loaded once and rounded answers as one that is loaded a second time, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from server.jobs.gate.peft_reference import Reference, logits_of, round_base
from support.models.models import FAMILY_NAMES, save_adapter, save_base

PROMPTS = [[3, 9, 27, 81, 5], [7, 7, 8]]


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_rounding_the_base_gives_what_loading_it_rounded_gives(
    tmp_path: Path, family: str, stored: torch.dtype
) -> None:
    base = save_base(tmp_path / "base", family, dtype=stored)
    adapter = save_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules="all-linear"), seed=0)
    reference = Reference(base, adapter, torch.device("cpu"))
    model = reference.load(torch.float32)
    exact = logits_of(model, PROMPTS)
    round_base(model, torch.bfloat16)
    rounded, loaded = logits_of(model, PROMPTS), logits_of(reference.load(torch.bfloat16), PROMPTS)
    for one, other, before in zip(rounded, loaded, exact, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, before)
