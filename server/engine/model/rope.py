"""Gives each attention layer a one-pass rotary embedding, and the model its angles in few launches.

On a GPU the rotation waits for the store of keys and values, which applies it in the same launch: q and k stay as they
are, and the layer's attention function takes the rotation with them (`take_rotation`).

Every family's attention calls a global function of its own module, `apply_rotary_pos_emb`. Replacing that global would
change every model in the process. So each layer gets a copy of its own `forward`: the same code with a copy of the
module's globals, in which that one name is the fused form.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
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
ROPES_THAT_SYNCHRONIZE = ("dynamic", "longrope")  # transformers reads the batch's length from the device for them
FREQUENCIES, SCALING = "inv_freq", "attention_scaling"  # attributes of every family's rotary module
PROBED_POSITIONS = (0, 1, 7, 1000, 131071)
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


class FusedAngles(nn.Module):
    """In place of a family's rotary module: the same cos and sin in five launches instead of nine. Its frequencies are
    kept for both halves at once, positions are not converted first, and a scaling of 1 is left out."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self._scalings: dict[str, float] = {}
        for name, frequencies in list(own.named_buffers(recurse=False)):
            if name.endswith(FREQUENCIES) and not name.endswith(f"original_{FREQUENCIES}"):
                self.register_buffer(name, torch.cat([frequencies.float()] * 2), persistent=False)
                self._scalings[name] = float(getattr(own, name.replace(FREQUENCIES, SCALING)))

    @property
    def layer_types(self) -> list[str | None]:
        """Those that have frequencies of their own; [None]: all layers share them."""
        return [name.removesuffix(FREQUENCIES).removesuffix("_") or None for name in self._scalings]

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each [..., T, rotated width], in x's dtype. position_ids: [..., T], whole numbers."""
        name = FREQUENCIES if layer_type is None else f"{layer_type}_{FREQUENCIES}"
        angles = position_ids[..., None] * getattr(self, name)
        cos, sin, scaling = angles.cos(), angles.sin(), self._scalings[name]
        if scaling != 1.0:
            cos, sin = cos * scaling, sin * scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rope_types(parameters: Mapping[str, Any]) -> set[object]:
    """All that a config's `rope_parameters` name: one for all layers, or one for each kind of layer."""
    parts = [part for part in parameters.values() if isinstance(part, Mapping)]
    return {part.get("rope_type") for part in (parameters, *parts)}


def fuse_rope(model: nn.Module) -> None:
    """Give the model `FusedAngles`, and rebind the name in each attention layer's forward, if the fused forms give the
    family's own results."""
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding") and not _synchronizes(module):
            fused = FusedAngles(module)
            if _gives_the_same(fused, module):
                model.set_submodule(path, fused)
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


def _synchronizes(rotary: nn.Module) -> bool:
    config: Any = getattr(rotary, "config", None)
    return bool(rope_types(getattr(config, "rope_parameters", None) or {}) & set(ROPES_THAT_SYNCHRONIZE))


@torch.inference_mode()
def _gives_the_same(fused: FusedAngles, own: nn.Module) -> bool:
    """To the last bit, for every kind of layer. The probes run before any request; they are torch's own operations."""
    device = next(own.buffers()).device
    positions = torch.tensor([PROBED_POSITIONS], device=device)
    x = torch.empty(1, dtype=torch.float32, device=device)
    kinds: list[dict[str, str]] = [{} if kind is None else {"layer_type": kind} for kind in fused.layer_types]
    return bool(kinds) and all(
        torch.equal(one, other)
        for kind in kinds
        for one, other in zip(own(x, positions, **kind), fused(x, positions, **kind), strict=True)
    )


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
