"""Norms and residual additions in one pass give what each family's own layers give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from server.engine.model.norms import FusedRMSNorm, fuse_norms
from support.models.models import FAMILY_NAMES, save_base


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_layer_of_every_family_adds_and_norms_in_one_pass(family: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / family, family)
    own, fused = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval() for _ in range(2))
    for norm in (module for module in own.modules() if type(module).__name__.endswith("RMSNorm")):
        torch.nn.init.normal_(norm.weight, 0.5, 0.2)
    fused.load_state_dict(own.state_dict())
    fuse_norms(fused)
    layers = [module for module in fused.modules() if hasattr(module, "self_attn")]
    assert len(layers) == fused.config.num_hidden_layers
    assert all("forward" in layer.__dict__ for layer in layers)
    assert not [name for name, module in fused.named_modules() if isinstance(module, (LlamaRMSNorm, Gemma3RMSNorm))]
    ids = torch.arange(12)[None] * 5 % fused.config.vocab_size
    with torch.inference_mode():
        expected, got = own(ids).logits, fused(ids).logits
    assert (got - expected).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


class TwiceNorm(nn.Module):
    """Ends like an RMSNorm's name, and is none of the known forms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.5))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * torch.nn.functional.rms_norm(x, (8,), self.weight, self.eps)


TwiceNorm.__name__ = "TwiceRMSNorm"


def test_a_norm_of_another_form_stays() -> None:
    model = nn.Sequential(TwiceNorm(), LlamaRMSNorm(8))
    fuse_norms(model)
    assert [type(module) for module in model] == [TwiceNorm, FusedRMSNorm]


class ScaledLayer(LlamaDecoderLayer):
    """Scales what its MLP gives."""

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
        hidden_states = hidden_states + attended
        return hidden_states + 0.5 * self.mlp(self.post_attention_layernorm(hidden_states))


class GatedLayer(LlamaDecoderLayer):
    """Has a part that no form knows."""

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
        hidden_states = hidden_states + self.gate(attended)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize("changed", [ScaledLayer, GatedLayer])
def test_a_layer_of_another_form_keeps_its_forward(changed: type[nn.Module], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "llama", "llama"), dtype=torch.bfloat16).eval()
    first = model.model.layers[0]
    first.__class__ = changed
    fuse_norms(model)
    assert "forward" not in first.__dict__
    assert "forward" in model.model.layers[1].__dict__


def test_a_kept_norm_is_for_one_tensor_and_one_call() -> None:
    norm = FusedRMSNorm(torch.ones(4), 1e-6)
    x, other = torch.ones(1, 4), torch.full((1, 4), 2.0)
    norm.keep(x, torch.zeros(1, 4))
    assert torch.equal(norm(x), torch.zeros(1, 4))
    norm.keep(x, torch.zeros(1, 4))
    for each in (other, x):
        assert torch.allclose(norm(each), torch.ones(1, 4))
