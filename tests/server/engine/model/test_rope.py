"""A model's rotary angles in few launches are its family's own, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from server.engine.model.rope import FusedAngles, fuse_rope
from support.models.models import FAMILY_CONFIGS

POSITIONS = torch.tensor([[0, 1, 2, 63, 4095, 99_999, 131_071]])
ALL_TYPES = [*FAMILY_CONFIGS, "llama3", "yarn"]


def rotary_of(kind: str) -> tuple[nn.Module, nn.Module]:
    """The model, and its own rotary module."""
    config = FAMILY_CONFIGS.get(kind, FAMILY_CONFIGS["llama"])()
    more: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 64}
    if kind == "llama3":
        more |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind not in FAMILY_CONFIGS:
        config.rope_parameters = {**config.rope_parameters, **more}
    model = AutoModelForCausalLM.from_config(config)
    return model, model.model.rotary_emb


class Launches(TorchDispatchMode):
    """Notes the operations that a device would launch."""

    VIEWS = ("empty", "unsqueeze", "expand", "transpose", "view", "detach", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def calls(
    module: nn.Module, dtype: torch.dtype, positions: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """cos and sin for each kind of layer that has frequencies of its own."""
    names = [name for name, _ in module.named_buffers() if name.endswith("inv_freq") and "original" not in name]
    for name in names:
        kind = name.removesuffix("inv_freq").removesuffix("_")
        yield module(torch.empty(1, dtype=dtype), positions, **({"layer_type": kind} if kind else {}))


@pytest.mark.parametrize("kind", [kind for kind in ALL_TYPES if kind != "phi3-longrope"])
@torch.inference_mode()
def test_angles_are_the_familys_own_to_the_last_bit(kind: str) -> None:
    model, own = rotary_of(kind)
    fuse_rope(model)
    fused = model.model.rotary_emb
    assert isinstance(fused, FusedAngles)
    for dtype in (torch.float32, torch.bfloat16):
        for positions in (POSITIONS, POSITIONS.int()):
            expected, got = list(calls(own, dtype, POSITIONS)), list(calls(fused, dtype, positions))
            assert len(expected) == len(got) >= 1
            for one, other in zip(expected, got, strict=True):
                assert all(map(torch.equal, one, other))
                assert one[0].dtype == dtype


@torch.inference_mode()
def test_they_take_five_launches() -> None:
    model, own = rotary_of("llama")
    fuse_rope(model)
    counted = []
    for module in (own, model.model.rotary_emb):
        with Launches() as launches:
            list(calls(module, torch.bfloat16, POSITIONS))
        counted.append(len(launches.names))
    assert counted[1] == 5 < counted[0]


def test_a_rope_that_looks_at_the_longest_position_stays() -> None:
    model, own = rotary_of("phi3-longrope")
    fuse_rope(model)
    assert model.model.rotary_emb is own
