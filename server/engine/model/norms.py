"""Gives a transformers model one-pass RMSNorms, and joins each residual addition with the norm that follows it.

A decoder layer adds to its residual twice, and each sum is normed next: by the layer's own norm, or by the next layer's
first one. So a layer gets a forward of its own that calls `add_rms_norm`. For the second sum it hands the normed result
to the next norm, which returns it when it is called with that very sum (`FusedRMSNorm.keep`).

Two forms of layer are known. Whether a family's layer has one is not read from its name: its own forward runs once over
stand-ins for its parts and must give the form's result.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.elementwise.launcher import add_rms_norm, rms_norm
from lora_kernels.elementwise.reference import rms_norm_reference

PARTS_OF_ALL = ("input_layernorm", "post_attention_layernorm", "mlp")
NORMS_OF_GEMMA = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
DROPOUTS = ("resid_attn_dropout", "resid_mlp_dropout")  # Phi-3's; identities while serving


class FusedRMSNorm(nn.Module):
    """An RMSNorm in one pass. one_plus: Gemma's form, which scales by 1 + weight and rounds once."""

    def __init__(self, weight: torch.Tensor, eps: float, *, one_plus: bool = False) -> None:
        super().__init__()
        self._weight = weight
        self._eps = eps
        self._one_plus = one_plus
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # one at most; a module's attribute takes 3 us to set

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._kept:
            of, normed = self._kept.pop()
            if of is x:
                return normed
        return rms_norm(x, self._weight, self._eps, one_plus=self._one_plus)

    def of_sum(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """residual + x, and its norm."""
        return add_rms_norm(x, residual, self._weight, self._eps, one_plus=self._one_plus)

    def keep(self, x: torch.Tensor, normed: torch.Tensor) -> None:
        """The next call, if it is with this x, returns normed."""
        self._kept[:] = [(x, normed)]


def fuse_norms(model: nn.Module) -> None:
    """Replace the norms, then the forwards of decoder layers whose form is known."""
    _replace_norms(model)
    layers = [module for module in model.modules() if _has_parts(module)]
    final = next((module for path, module in model.named_modules() if path.endswith("model.norm")), None)
    following = [*(layer.input_layernorm for layer in layers[1:]), final]
    for layer, next_norm in zip(layers, following, strict=False):
        form = next((form for form in (_run_llama, _run_gemma) if _has_form(layer, form)), None)
        if form is not None and isinstance(next_norm, FusedRMSNorm):
            layer.forward = types.MethodType(_forward(form, next_norm), layer)


def _replace_norms(model: nn.Module) -> None:
    for path, module in list(model.named_modules()):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
            continue
        one_plus = next((form for form in (False, True) if _norm_has_form(module, eps, one_plus=form)), None)
        if one_plus is not None:
            weight = module.get_parameter("weight").detach()
            model.set_submodule(path, FusedRMSNorm(weight, eps, one_plus=one_plus))


@torch.inference_mode()
def _norm_has_form(module: nn.Module, eps: float, *, one_plus: bool) -> bool:
    """Families differ in where they round and what they add to the weight, so compare the module with the reference.
    No kernel runs here: on a GPU none may run before it is tested."""
    weight = module.get_parameter("weight")
    probe = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    one_rounding = torch.finfo(weight.dtype).eps
    expected = rms_norm_reference(probe, weight, eps, one_plus=one_plus)
    return torch.allclose(module(probe), expected, rtol=one_rounding, atol=one_rounding)


def _has_parts(module: nn.Module) -> bool:
    norms = [name for name in (*PARTS_OF_ALL[:2], *NORMS_OF_GEMMA) if hasattr(module, name)]
    fused = all(isinstance(getattr(module, name), FusedRMSNorm) for name in norms)
    return fused and all(hasattr(module, name) for name in ("self_attn", *PARTS_OF_ALL))


def _run_llama(layer: Any, x: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual after attention, and what the layer adds to it."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **options)
    x, normed = layer.post_attention_layernorm.of_sum(attended, x)
    return x, layer.mlp(normed)


def _run_gemma(layer: Any, x: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for layers that also norm what attention and MLP give."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **options)
    x, normed = layer.pre_feedforward_layernorm.of_sum(layer.post_attention_layernorm(attended), x)
    return x, layer.post_feedforward_layernorm(layer.mlp(normed))


Form = Callable[[Any, torch.Tensor, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]


def _forward(form: Form, next_norm: FusedRMSNorm) -> Callable[..., torch.Tensor]:
    def forward(layer: nn.Module, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        x, added = form(layer, hidden_states, options)
        x, normed = next_norm.of_sum(added, x)
        next_norm.keep(x, normed)
        return x

    return forward


class _StandIn:
    """A layer's parts, each another affine function of what it is given; counts as a norm too."""

    def __init__(self, names: Sequence[str]) -> None:
        self.self_attn = lambda hidden_states, **_: (hidden_states * 1.5 - 2.0, None)
        for name in DROPOUTS:
            setattr(self, name, lambda x: x)
        for place, name in enumerate(names):
            setattr(self, name, _Affine(1.25 + place, 0.5 - place))


class _Affine:
    def __init__(self, factor: float, added: float) -> None:
        self._factor, self._added = factor, added

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self._factor + self._added

    def of_sum(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return residual + x, self(residual + x)


def _has_form(layer: nn.Module, form: Form) -> bool:
    """Whether the layer's own forward does what the form does, and asks for no part that the form does not know."""
    names = (*PARTS_OF_ALL, *NORMS_OF_GEMMA) if hasattr(layer, NORMS_OF_GEMMA[0]) else PARTS_OF_ALL
    parts, probe = _StandIn(names), torch.linspace(-3, 3, 12).view(1, 3, 4)
    try:
        own = inspect.unwrap(type(layer).forward)(parts, probe)
        residual, added = form(parts, probe, {})
    except (AttributeError, TypeError):
        return False
    return isinstance(own, torch.Tensor) and torch.allclose(own, residual + added)
