"""Which architectures are served, and which of their linear layers read the same input. Knows names, no tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapters_store.errors import ExitCode, UserError

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
QKV = SEPARATE[0]
HEAD = "lm_head"


class UnsupportedBase(UserError):
    """This base cannot be served exactly; the message names what is unsupported and what is supported."""

    exit_code = ExitCode.UNSUPPORTED

    def __init__(self, message: str) -> None:
        super().__init__("unsupported_base", message, param="base")


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. layer_groups: a decoder layer's linear layers by what they read, in the order of their calls.

    layers, embedding: where the decoder layers and the token embedding lie in transformers' model.
    """

    architecture: str
    layer_groups: LayerGroups = SEPARATE
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"

    def groups(self, num_layers: int) -> Iterator[tuple[str, ...]]:
        """Dotted module paths, group by group in model order, the head last."""
        for layer in range(num_layers):
            for group in self.layer_groups:
                yield tuple(f"{self.layers}.{layer}.{suffix}" for suffix in group)
        yield (HEAD,)


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM"),
        Family("MistralForCausalLM"),
        Family("Qwen2ForCausalLM"),
        Family("Qwen3ForCausalLM"),
        Family("GemmaForCausalLM"),
        Family("Gemma2ForCausalLM"),
        Family("Gemma3ForCausalLM"),
        Family("Phi3ForCausalLM", FUSED),
        Family("GraniteForCausalLM"),
        Family("Olmo2ForCausalLM"),
        Family("Glm4ForCausalLM", (QKV, *FUSED[1:])),
        Family("Starcoder2ForCausalLM", (QKV, ("self_attn.o_proj",), ("mlp.c_fc",), ("mlp.c_proj",))),
        Family("PhiForCausalLM", (QKV, ("self_attn.dense",), ("mlp.fc1",), ("mlp.fc2",))),
        Family(
            "GPTNeoXForCausalLM",
            (("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
            layers="gpt_neox.layers",
            embedding="gpt_neox.embed_in",
        ),
    )
}


def family_of(architectures: object, *, own_code: object = None) -> Family:
    """The family of a config's `architectures`; UnsupportedBase names one that is not served.

    own_code: the config's `auto_map`, classes that the folder brings; they are never run.
    """
    given = architectures[0] if isinstance(architectures, list) and architectures else architectures
    name = given if isinstance(given, str) else "none given"
    if name not in FAMILIES:
        note = "; the Python code in its folder is never run" if own_code else ""
        raise UnsupportedBase(f"base architecture {name[:80]} is not supported; supported: {', '.join(FAMILIES)}{note}")
    return FAMILIES[name]
