"""Gives each attention layer a one-pass rotary embedding; transformers' module stays unchanged.

On a GPU the rotation waits for the store of keys and values, which applies it in the same launch: q and k go on as they
are, and the layer's attention function takes the rotation with them (`take_rotation`).

Every family's attention calls a global function of its own module, `apply_rotary_pos_emb`. Replacing that global would
change every model in the process. So each layer gets a copy of its own `forward`: the same code with a copy of the
module's globals, in which that one name is the fused form.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_kernels.attention.batch import Rotation
from lora_kernels.attention.launcher import rotates_while_storing
from lora_kernels.elementwise.launcher import rope_in_place
from lora_kernels.elementwise.reference import rope_reference

WAITING = "waiting_rotation"  # an attention layer's attribute between its rotary embedding and its attention
NAME = "apply_rotary_pos_emb"  # a global of every family's module
Rope = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A rotation, and the tensors that it is for."""

    query: torch.Tensor
    key: torch.Tensor
    rotation: Rotation


def take_rotation(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> Rotation | None:
    """What the layer's rotary embedding left to the store; None: q and k are rotated."""
    waiting: _Waiting | None = module.__dict__.pop(WAITING, None)
    if waiting is None:
        return None
    is_same = waiting.query is query and waiting.key is key
    assert is_same, f"{type(module).__name__} changed q or k after its rotary embedding"
    return waiting.rotation


def fuse_rope(model: nn.Module) -> None:
    """Rebind the name in each attention layer's forward, if the fused form gives the family's own result."""
    for module in model.modules():
        forward = type(module).forward
        code, scope = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
        if code is not None and NAME in code.co_names and _agrees(scope[NAME], module):
            rope = _waits_for_store(module, _in_place(scope[NAME]))
            own = types.FunctionType(code, {**scope, NAME: rope}, NAME, forward.__defaults__)
            own.__kwdefaults__ = forward.__kwdefaults__
            module.forward = types.MethodType(own, module)


def _waits_for_store(module: nn.Module, at_once: Rope) -> Rope:
    def rope(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_plain = not options and torch.is_inference_mode_enabled() and len(q) == 1
        if not is_plain or not rotates_while_storing(q[0], k[0], cos[0]):
            return at_once(q, k, cos, sin, **options)
        module.__dict__[WAITING] = _Waiting(q, k, Rotation(cos[0], sin[0]))
        return q, k

    return rope


def _in_place(original: Rope) -> Rope:
    def rope(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In place: q and k are this layer's own projections, and nothing reads them unrotated."""
        if options or not torch.is_inference_mode_enabled():
            return original(q, k, cos, sin, **options)
        if not rope_in_place(q, cos, sin):
            return original(q, k, cos, sin)
        done = rope_in_place(k, cos, sin)
        assert done, "q was rotated and k cannot be: they differ in more than their heads"
        return q, k

    return rope


@torch.inference_mode()
def _agrees(original: Rope, module: nn.Module) -> bool:
    """Families may rotate differently (interleaved, partial): compare the family's own function with the reference.
    No kernel runs here: on a GPU none may run before it is tested."""
    head_dim = int(getattr(module, "head_dim", 0))
    if head_dim < 2 or getattr(module, "rotary_ndims", head_dim) != head_dim:
        return False  # a layer that turns a part of q and k joins it with the rest afterwards
    generator = torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")
    q, k = (torch.randn(1, heads, 3, head_dim, generator=generator, device=cpu) for heads in (2, 1))
    angles = torch.randn(1, 3, head_dim // 2, generator=generator, device=cpu).repeat(1, 1, 2)
    expected = original(q, k, angles.cos(), angles.sin())
    got = [rope_reference(each, angles.cos(), angles.sin()) for each in (q, k)]
    return all(torch.allclose(one, other, atol=1e-5) for one, other in zip(expected, got, strict=True))
