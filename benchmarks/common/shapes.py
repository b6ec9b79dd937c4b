"""The benchmarks' base model: its shape, and a random copy of it on disk, made once. Knows sizes and files only."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig
from transformers.utils.logging import disable_progress_bar

from lora_kernels.native.build import cache_dir

RANK = 16  # of an adapter, unless a benchmark says otherwise
SPECIAL = ("<s>", "</s>")
PRINTABLE = [chr(code) for code in range(0x21, 0x7F)]


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Linear layers that read one input: in_features, and each member's out_features."""

    in_features: int
    out_features: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BenchShape:
    """A Llama in bfloat16 with a tied head."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def name(self) -> str:
        return f"llama-h{self.hidden}-l{self.layers}-i{self.intermediate}-v{self.vocab}"

    @property
    def groups(self) -> dict[str, GroupShape]:
        """One decoder layer's groups, in the order of its forward."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "qkv": GroupShape(self.hidden, (self.hidden, kv, kv)),
            "o": GroupShape(self.hidden, (self.hidden,)),
            "gate_up": GroupShape(self.hidden, (self.intermediate, self.intermediate)),
            "down": GroupShape(self.intermediate, (self.hidden,)),
        }

    def adapter_bytes(self, rank: int) -> int:
        """A bfloat16 adapter on every linear layer."""
        per_layer = sum(len(g.out_features) * g.in_features + sum(g.out_features) for g in self.groups.values())
        return 2 * rank * self.layers * per_layer

    def config(self, **changes: Any) -> PretrainedConfig:
        return LlamaConfig(**{"intermediate_size": self.intermediate, **self._sizes, **changes})

    @property
    def _sizes(self) -> dict[str, Any]:
        """Of any architecture."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }


@dataclass(frozen=True, slots=True)
class ExpertsShape(BenchShape):
    """A Qwen3-MoE: `num_experts` of `intermediate` in each layer, of which a token has `top`."""

    num_experts: int
    top: int

    @property
    def name(self) -> str:
        return f"qwen3moe-h{self.hidden}-l{self.layers}-e{self.num_experts}x{self.intermediate}-v{self.vocab}"

    def adapter_bytes(self, rank: int) -> int:
        """A bfloat16 adapter on attention and every expert."""
        width = self.hidden // self.heads * (self.heads + self.kv_heads)
        of_experts = self.num_experts * (2 * self.hidden + 3 * self.intermediate)
        return 2 * rank * self.layers * (4 * self.hidden + 2 * width + of_experts)

    def config(self, **changes: Any) -> PretrainedConfig:
        own = {
            "head_dim": self.hidden // self.heads,
            "moe_intermediate_size": self.intermediate,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top,
            "norm_topk_prob": True,
        }
        return Qwen3MoeConfig(**{**own, **self._sizes, **changes})


FULL = BenchShape(hidden=1024, layers=12, intermediate=2816, heads=16, kv_heads=8, vocab=8192)
QUICK = BenchShape(hidden=64, layers=2, intermediate=96, heads=4, kv_heads=2, vocab=512)


def shape_for(*, quick: bool) -> BenchShape:
    return QUICK if quick else FULL


def bench_cache() -> Path:
    """Where bases and stores are kept between runs; MULTILORA_BENCH_CACHE moves it."""
    own = os.environ.get("MULTILORA_BENCH_CACHE")
    return Path(own) if own else cache_dir() / "bench"


def base_folder(shape: BenchShape) -> Path:
    """The shape's base with random weights and a tokenizer of the same vocabulary."""
    disable_progress_bar()  # transformers' own, for files of a moment
    return made_once(bench_cache() / shape.name, lambda folder: _save_base(shape, folder))


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, filled by `make` unless it exists already; it appears whole or not at all."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        make(folder)
        if not target.exists():  # another process may have been quicker
            shutil.move(folder, target)
    return target


def _save_base(shape: BenchShape, folder: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16).save_pretrained(folder)
    save_tokenizer(shape.vocab, folder)


def save_tokenizer(vocab_size: int, folder: Path) -> None:
    core = byte_pair_tokenizer(vocab_size)
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token=SPECIAL[0], eos_token=SPECIAL[1]).save_pretrained(folder)


def byte_pair_tokenizer(vocab_size: int) -> Tokenizer:
    """Two special tokens, the 256 bytes, then pairs and triples of printable characters until the vocabulary is full:
    every token is text, so that turning tokens into text costs what it costs in service, and every id is sampled."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [first + second for first, second in product(PRINTABLE, PRINTABLE)]
    every = chain(product(PRINTABLE, PRINTABLE), product(pairs, PRINTABLE))
    merges = list(islice(every, max(0, vocab_size - len(SPECIAL) - len(alphabet))))
    words = [*SPECIAL, *alphabet, *(first + second for first, second in merges)]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    return core
