"""A base's shape and what follows from it: parameters, linear layers, bytes of keys and values."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from adapters_store.base.converted.door import is_gguf, opened_gguf
from adapters_store.base.families import UnsupportedBase
from adapters_store.base.folder import read_config
from adapters_store.errors import InputRefused

NF4_BITS = (
    4 + 8 / 64 + 32 / (64 * 256)
)  # values, their absmax as a byte, and its own absmax (QLoRA, arXiv 2305.14314, 3)
_GEMMA: Mapping[str, Any] = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
_LEFT_OUT: Mapping[str, Mapping[str, Any]] = {  # by model_type, what transformers takes if config.json omits it
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "num_attention_heads": 8, "vocab_size": 262208},
    "granite": {},
    "phi3": {},
}
_FOUR_NORMS = ("gemma2", "gemma3_text")
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([bBmM])")
_SOFT_CAP = "Gemma 2 caps its attention scores, so training keeps them: T x T a head and layer, not counted here"
_ATTENTION_BIAS = ("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "granite")  # read it: q, k, v and o
_QK_NORMS = ("qwen3", "gemma3_text")


class PlanError(InputRefused):
    """A question that cannot be answered; the message names field, value and limit."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__("bad_plan", message, param=param)


def require_at_least(low: int, found: object, *names: str, of: str = "") -> None:
    """Raises PlanError for the first of these attributes that is below `low`; None is not."""
    for name in names:
        value = getattr(found, name)
        if value is not None and value < low:
            raise PlanError(name, f"{of}{name} must be at least {low}, got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder of gated MLPs and grouped-query attention.

    exact_parameters: if only a count is known, that count; the rest of the shape is then assumed.
    output_bias: a bias on o_proj.
    norms: norm vectors of `hidden` in a layer. qk_norm: norms of head_dim on queries and keys.
    """

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    fused: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    norms: int = 2
    qk_norm: bool = False
    exact_parameters: int | None = None
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("hidden", "layers", "intermediate", "heads", "kv_heads", "head_dim", "vocab")
        require_at_least(1, self, *sizes, of=f"{self.name}: ")

    @cached_property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """One layer's linear layers: last name -> (in_features, out_features)."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.fused:
            first = {"qkv_proj": (self.hidden, query + 2 * key)}
            gated = {"gate_up_proj": (self.hidden, 2 * self.intermediate)}
        else:
            first = {"q_proj": (self.hidden, query), "k_proj": (self.hidden, key), "v_proj": (self.hidden, key)}
            gated = {"gate_proj": (self.hidden, self.intermediate), "up_proj": (self.hidden, self.intermediate)}
        return {**first, "o_proj": (query, self.hidden), **gated, "down_proj": (self.intermediate, self.hidden)}

    @property
    def embedding_parameters(self) -> int:
        """Embeddings, and the head if it is not the same tensor."""
        return (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def small_parameters(self) -> int:
        """Norms and biases."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        in_layer = self.norms * self.hidden + 2 * self.head_dim * self.qk_norm + (query + 2 * key) * self.qkv_bias
        in_layer += self.hidden * self.output_bias
        return self.layers * in_layer + self.hidden

    @property
    def linear_parameters(self) -> int:
        """Weights of the layers' linear modules: what NF4 quantises and what an adapter may target."""
        if self.exact_parameters is not None:
            return self.exact_parameters - self.embedding_parameters - self.small_parameters
        return self.layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.embedding_parameters + self.small_parameters

    @property
    def multiplied_parameters(self) -> int:
        """Weights that each token is multiplied with: linear layers and the head."""
        return self.linear_parameters + self.vocab * self.hidden

    def weight_bytes(self, precision: str, *, nf4: bool = False) -> int:
        """The base, resident; with nf4 its linear layers at 4.127 bits, embeddings, head and norms in `precision`."""
        element = bytes_of(precision)
        if not nf4:
            return element * self.parameters
        return round(self.linear_parameters * NF4_BITS / 8) + element * (self.parameters - self.linear_parameters)

    def adapter_parameters(
        self, rank: int, targets: Iterable[str] | None = None, rank_pattern: Mapping[str, int] | None = None
    ) -> int:
        """A and B on the targeted linear layers of every layer (None: all of them). rank_pattern: by last name.

        Raises PlanError if a target is no linear layer of a decoder layer.
        """
        chosen = list(self.linears) if targets is None else [name.rpartition(".")[2] for name in targets]
        for name in chosen:
            if name not in self.linears:
                raise PlanError("target_modules", f"{name!r} is none of {', '.join(self.linears)}")
        ranks = rank_pattern or {}
        return self.layers * sum(ranks.get(name, rank) * sum(self.linears[name]) for name in set(chosen))

    def kv_bytes(self, tokens: int, precision: str = "bfloat16") -> int:
        """Keys and values of so many tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * bytes_of(precision)


def bytes_of(precision: str) -> int:
    """Bytes of one element. Raises PlanError for an unknown precision."""
    known = {"float32": 4, "bfloat16": 2, "float16": 2}
    if precision not in known:
        raise PlanError("precision", f"precision must be one of {', '.join(known)}, got {precision!r}")
    return known[precision]


# name: hidden, layers, intermediate, heads, KV heads, vocabulary; from the published config.json files
_PUBLISHED = {
    "smollm2-135m": (576, 30, 1536, 9, 3, 49152),
    "smollm2-360m": (960, 32, 2560, 15, 5, 49152),
    "llama-3.2-1b": (2048, 16, 8192, 32, 8, 128256),
    "llama-3.2-3b": (3072, 28, 8192, 24, 8, 128256),
    "llama-2-7b": (4096, 32, 11008, 32, 32, 32000),
    "mistral-7b": (4096, 32, 14336, 32, 8, 32000),
    "llama-3.1-8b": (4096, 32, 14336, 32, 8, 128256),
    "qwen3-8b": (4096, 36, 12288, 32, 8, 151936),
    "llama-2-13b": (5120, 40, 13824, 40, 40, 32000),
    "qwen3-32b": (5120, 64, 25600, 64, 8, 151936),
    "llama-3.1-70b": (8192, 80, 28672, 64, 8, 128256),
    "llama-3.1-405b": (16384, 126, 53248, 128, 8, 128256),
}
_TIED = ("smollm2", "llama-3.2")


def _published(name: str) -> ModelShape:
    hidden, layers, intermediate, heads, kv_heads, vocab = _PUBLISHED[name]
    is_qwen3 = name.startswith("qwen3")
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=layers,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128 if is_qwen3 else hidden // heads,
        vocab=vocab,
        tied=name.startswith(_TIED),
        qk_norm=is_qwen3,
    )


KNOWN_SHAPES: Mapping[str, ModelShape] = {name: _published(name) for name in _PUBLISHED}


def shape_of_count(parameters: int) -> ModelShape:
    """A shape for a bare parameter count: the known model nearest in size, its number of layers scaled to the count.

    The count itself stays as given. Raises PlanError below 100 million, where embeddings leave nothing to scale.
    """
    if parameters < 100_000_000:
        raise PlanError("parameters", f"parameters must be at least 100M, got {parameters}; name a config.json instead")
    near = min(KNOWN_SHAPES.values(), key=lambda shape: abs(shape.parameters / parameters - 1))
    linear = parameters - near.embedding_parameters - near.small_parameters
    layers = max(1, round(near.layers * linear / near.linear_parameters))
    assumption = f"shape of {near.name} with {layers} layers, holding exactly {parameters:,} parameters"
    return replace(near, name=_short(parameters), layers=layers, exact_parameters=parameters, assumptions=(assumption,))


def shape_named(text: str) -> ModelShape:
    """A folder with a config.json (or that file), a GGUF file, a known model, or a count such as 7B or 350M."""
    if text.lower() in KNOWN_SHAPES:
        return KNOWN_SHAPES[text.lower()]
    count = _COUNT.fullmatch(text)
    if count is not None:
        return shape_of_count(round(float(count[1]) * (1e9 if count[2] in "bB" else 1e6)))
    path = Path(os.path.expanduser(text))  # Path.expanduser raises for an unknown user
    if not path.exists():
        known = ", ".join(KNOWN_SHAPES)
        raise PlanError("model", f"{text!r} is no folder, no count such as 7B or 350M, and none of {known}")
    return shape_of_config(path)


def shape_of_config(folder: Path) -> ModelShape:
    """The shape in a folder's config.json (or that file, or a GGUF one), what it leaves out being the family's default.

    Raises PlanError for a family that is not counted here. Does not import transformers, which takes seconds.
    """
    folder = folder.parent if folder.name == "config.json" else folder
    try:
        body = opened_gguf(folder).config if is_gguf(folder) else read_config(folder)
    except UnsupportedBase as error:
        raise PlanError("model", str(error).removeprefix("--base ")) from error
    inner = body.get("text_config")
    config = inner if isinstance(inner, dict) else body
    kind = str(config.get("model_type"))
    if kind not in _LEFT_OUT:
        known = ", ".join(_LEFT_OUT)
        raise PlanError("model", f"{folder}: model_type {kind!r} is not counted; known: {known}")
    try:
        return _shape_of({**_LEFT_OUT[kind], **config}, folder.resolve().name)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise PlanError("model", f"{folder}: config.json has no usable {error}") from error


def _shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    kind, heads = config["model_type"], int(config["num_attention_heads"])
    has_biases = bool(config.get("attention_bias")) and kind in _ATTENTION_BIAS
    return ModelShape(
        name=name,
        hidden=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        intermediate=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocab=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        fused=kind == "phi3",
        qkv_bias=kind == "qwen2" or has_biases,
        output_bias=has_biases,
        norms=4 if kind in _FOUR_NORMS else 2,
        qk_norm=kind in _QK_NORMS,
        assumptions=(_SOFT_CAP,) if kind == "gemma2" else (),
    )


def _short(count: int) -> str:
    return f"{count / 1e9:g}B" if count >= 1e9 else f"{count / 1e6:g}M"
