"""Which architectures are served, and which of their linear layers read the same input. Knows names, no tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ROUTER = "mlp.gate"
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
    has_transposed_weights: its layers' weights are [in_features, out_features] (GPT-2's Conv1D), but not the head's.
    experts: parameters [experts, out_features, in_features] of its decoder layers, or of some of them: first the one
        that reads the layer's input (gate and up in one), then the one that writes its output.
    router: what scores the experts for each token, in the layers that have any; its weight is a linear layer's.
    """

    architecture: str
    layer_groups: LayerGroups = SEPARATE
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    has_transposed_weights: bool = False
    experts: tuple[str, ...] = ()
    router: str | None = None

    def groups(self, num_layers: int) -> Iterator[tuple[str, ...]]:
        """Dotted module paths, group by group in model order, the head last. Routers also in layers that have none."""
        for layer in range(num_layers):
            for group in (*self.layer_groups, *([(self.router,)] if self.router else [])):
                yield tuple(f"{self.layers}.{layer}.{suffix}" for suffix in group)
        yield (HEAD,)

    def is_router(self, module: str) -> bool:
        return self.router is not None and module.endswith(f".{self.router}")

    def expert_stacks(self, num_layers: int) -> Iterator[str]:
        """Dotted paths of the experts' parameters, also in layers that have none, in model order."""
        for layer in range(num_layers):
            for suffix in self.experts:
                yield f"{self.layers}.{layer}.{suffix}"


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
        Family("Qwen3MoeForCausalLM", SEPARATE[:2], experts=EXPERTS, router=ROUTER),
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
        Family(
            "GPT2LMHeadModel",
            (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
            layers="transformer.h",
            embedding="transformer.wte",
            has_transposed_weights=True,
        ),
    )
}


# Architectures of text and pictures -> the one that their text side is: for text alone both compute the same.
TEXT_SIDES: Mapping[str, str] = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Qwen2VLForConditionalGeneration": "Qwen2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2ForCausalLM",
    "Qwen3VLForConditionalGeneration": "Qwen3ForCausalLM",
}
# Where the text model lies in such a model, and in the names of its adapters -> where it lies by itself
TEXT_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head", HEAD),
)


def text_side_name(name: str) -> str:
    """A tensor or module of a model of text and pictures, as its text model by itself calls it."""
    for outer, own in TEXT_PREFIXES:
        if name.startswith(outer):
            return own + name[len(outer) :]
    return name


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
