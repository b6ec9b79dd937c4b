"""Which architectures are served, and which of their linear layers read the same input. Knows names, no tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LayerGroups = tuple[tuple[str, ...], ...]

SEPARATE: LayerGroups = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
FUSED: LayerGroups = (
    ("self_attn.qkv_proj",),
    ("self_attn.o_proj",),
    ("mlp.gate_up_proj",),
    ("mlp.down_proj",),
)
HEAD = "lm_head"

FAMILIES: dict[str, LayerGroups] = {
    "LlamaForCausalLM": SEPARATE,
    "MistralForCausalLM": SEPARATE,
    "Qwen2ForCausalLM": SEPARATE,
    "Qwen3ForCausalLM": SEPARATE,
    "Gemma2ForCausalLM": SEPARATE,
    "Gemma3ForCausalLM": SEPARATE,
    "Phi3ForCausalLM": FUSED,
}


class UnsupportedBase(ValueError):
    """This base cannot be served exactly; the message names what is unsupported and what is supported."""


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture and its decoder layers' groups of linear layers."""

    architecture: str
    layer_groups: LayerGroups

    def groups(self, num_layers: int) -> Iterator[tuple[str, ...]]:
        """Dotted module paths, group by group in model order, the head last."""
        for layer in range(num_layers):
            for group in self.layer_groups:
                yield tuple(f"model.layers.{layer}.{suffix}" for suffix in group)
        yield (HEAD,)


def family_of(architectures: list[str] | None) -> Family:
    """The family of a config's `architectures`; UnsupportedBase names it where we have none."""
    name = architectures[0] if architectures else "none given"
    if name not in FAMILIES:
        raise UnsupportedBase(f"base architecture {name} is not supported; supported: {', '.join(FAMILIES)}")
    return Family(name, FAMILIES[name])
