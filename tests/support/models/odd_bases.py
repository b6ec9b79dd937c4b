"""Folders given as a base that are none, or more than a base; and sound ones that bring code. All made here.

Every one of them also holds Python, as a module, as a tokenizer's and as a pickle, that writes a marker when it is run.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MARKER = "the-folders-code-ran"
MODULES = ("configuration_own.py", "modeling_own.py", "tokenization_own.py", "custom_generate/generate.py")
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 1234567\n"
OWN_CODE = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
FIRST_NORM = "model.layers.0.input_layernorm.weight"


class _Payload:
    """A pickle that makes `path` when it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@dataclass(frozen=True)
class Odd:
    """make: spoils a copy of a sound base in place. words: of the refusal, all of them. place: what is wrong is seen in
    the "config", the "weights" or the "tokenizer": a command that does not read it has nothing to refuse."""

    make: Callable[[Path], object]
    words: tuple[str, ...]
    place: str = "config"


def add_code(folder: Path) -> Path:
    """Put code into every place where a library might look. Returns the marker that it would make."""
    marker = folder.parent / MARKER
    for name in MODULES:
        module = folder / name
        module.parent.mkdir(exist_ok=True)
        module.write_text(f"open({str(marker)!r}, 'w').close()\n\n\nclass OwnConfig: ...\n")
    (folder / "training_args.bin").write_bytes(pickle.dumps(_Payload(marker)))
    return marker


def change_json(path: Path, **changes: Any) -> None:
    """None takes a key away."""
    body = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in body.items() if value is not None}))


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **changes)


def _tokenizer_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "tokenizer_config.json", **changes)


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _pointer(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(POINTER) and None


def _without(*patterns: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)] and None


def _both(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: [step(folder) for step in steps] and None


def _pickled(name: str) -> Callable[[Path], None]:
    """The weights as a pickle alone, one that would run code."""
    return _both(
        _without("*.safetensors"),
        lambda folder: (folder / name).write_bytes(pickle.dumps(_Payload(folder.parent / MARKER))),
    )


def in_shards(folder: Path, *, lost: int = 0, index: bool = True) -> None:
    """The weights in three files, the last `lost` of which are not there."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + number % 3}-of-00003.safetensors" for number, name in enumerate(tensors)}
    for file in sorted(set(weight_map.values()))[: 3 - lost]:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    if index:
        change_json(folder / "model.safetensors.index.json", metadata={}, weight_map=weight_map)


def _leads_out(folder: Path) -> None:
    in_shards(folder)
    moved = folder.parent / "elsewhere.safetensors"
    shutil.move(folder / "model-00003-of-00003.safetensors", moved)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(
        json.dumps({"weight_map": {k: v.replace("model-00003-of-00003", "../elsewhere") for k, v in names.items()}})
    )


def _adapter(folder: Path, **body: Any) -> None:
    change_json(folder / "adapter_config.json", **body)


def _peft_adapter(folder: Path) -> None:
    """A LoRA that PEFT's loader would take: it would change the base's answers."""
    weight = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.ones(2, weight.shape[1]), name.format("B"): torch.ones(weight.shape[0], 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    _adapter(
        folder, peft_type="LORA", r=2, lora_alpha=64, target_modules=["q_proj"], base_model_name_or_path="org/base-1B"
    )


def _template(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text) and None


def _named_templates(*names: str) -> Callable[[Path], None]:
    named = [{"name": name, "template": "{{ messages[0]['content'] }}"} for name in names]
    return _both(_without("chat_template.jinja"), _tokenizer_config(chat_template=named))


ODD: dict[str, Odd] = {
    "own-architecture": Odd(
        _config(architectures=["ChatGLMModel"], model_type="chatglm", auto_map=OWN_CODE),
        ("ChatGLMModel is not supported", "LlamaForCausalLM", "never run"),
    ),
    "own-type-under-a-known-name": Odd(
        _config(model_type="own", auto_map=OWN_CODE), ("LlamaForCausalLM has model_type 'llama', got 'own'",)
    ),
    "another-type": Odd(_config(model_type="mistral"), ("LlamaForCausalLM has model_type 'llama', got 'mistral'",)),
    "no-architecture": Odd(_config(architectures=None), ("none given is not supported", "LlamaForCausalLM")),
    "architecture-as-text": Odd(_config(architectures={"a": 1}), ("none given is not supported",)),
    "layers-as-text": Odd(_config(num_hidden_layers="two"), ("config.json cannot be read", "num_hidden_layers")),
    "dtype-of-the-os": Odd(_config(dtype="os.system"), ("config.json",)),
    "config-is-a-list": Odd(lambda folder: (folder / "config.json").write_text("[1]"), ("must hold an object",)),
    "config-is-cut": Odd(lambda folder: (folder / "config.json").write_text('{"a'), ("config.json is no JSON",)),
    "config-is-a-pointer": Odd(_pointer("config.json"), ("config.json is a Git LFS pointer", "git lfs pull")),
    "other-weights-named": Odd(
        _config(transformers_weights="other.safetensors"), ("transformers_weights",), place="weights"
    ),
    "stored-as-gptq": Odd(
        _config(quantization_config={"quant_method": "gptq", "bits": 4}), ("stored as gptq",), place="weights"
    ),
    "mlx-quantised": Odd(
        _config(quantization={"group_size": 64, "bits": 4}, quantization_config={"group_size": 64, "bits": 4}),
        ("quantised by MLX-LM (4 bits)", "converted from"),
    ),
    "adapter-beside-the-base": Odd(
        _peft_adapter,
        ("holds a PEFT adapter", "every tenant", "`multilora adapter push`"),
    ),
    "adapter-alone": Odd(
        _both(_peft_adapter, _without("config.json", "model.safetensors")),
        ("is a PEFT adapter, not a base", "org/base-1B", "`multilora adapter push`"),
    ),
    "mlx-adapter": Odd(
        _both(
            _without("config.json", "*.safetensors"),
            lambda folder: _adapter(
                folder, fine_tune_type="lora", model="mlx-community/m", lora_parameters={"rank": 8}
            ),
        ),
        ("is an MLX-LM adapter, not a base", "mlx-community/m"),
    ),
    "gguf": Odd(
        _both(_without("config.json", "*.safetensors"), lambda folder: (folder / "m.Q4.gguf").write_bytes(b"GGUF")),
        ("no config.json there", "m.Q4.gguf holds GGUF weights"),
    ),
    "makers-format": Odd(
        _both(
            _without("config.json", "*.safetensors"),
            lambda folder: (folder / "consolidated.00.pth").write_bytes(pickle.dumps(_Payload(folder.parent / MARKER))),
        ),
        ("no config.json there", "maker's own format"),
    ),
    "pickled": Odd(
        _pickled("pytorch_model.bin"),
        ("no *.safetensors there", "pytorch_model.bin holds pickled weights", "`save_pretrained`"),
        place="weights",
    ),
    "pickled-in-parts": Odd(
        _pickled("pytorch_model-00001-of-00002.bin"), ("holds pickled weights", "`save_pretrained`"), place="weights"
    ),
    "pickle-in-the-index": Odd(
        _both(
            _pickled("pytorch_model.bin"),
            lambda folder: change_json(
                folder / "model.safetensors.index.json", weight_map={FIRST_NORM: "pytorch_model.bin"}
            ),
        ),
        ("index.json names 'pytorch_model.bin'",),
        place="weights",
    ),
    "index-leads-out": Odd(_leads_out, ("index.json names '../elsewhere.safetensors'",), place="weights"),
    "shards-lost": Odd(
        lambda folder: in_shards(folder, lost=2),
        ("2 of 3 weight files are missing", "model-00002-of-00003.safetensors", "`hf download`"),
        place="weights",
    ),
    "index-lost": Odd(
        lambda folder: in_shards(folder, index=False), ("no model.safetensors.index.json",), place="weights"
    ),
    "index-empty": Odd(
        _both(in_shards, lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')),
        ("has no weight_map",),
        place="weights",
    ),
    "checkpoint-of-ranks": Odd(
        lambda folder: shutil.copy(
            folder / "model.safetensors", folder / "shard-00000-model-00001-of-00001.safetensors"
        ),
        ("torch.distributed", "`save_pretrained`"),
        place="weights",
    ),
    "weights-are-a-pointer": Odd(
        _pointer("model.safetensors"), ("model.safetensors is a Git LFS pointer", "git lfs pull"), place="weights"
    ),
    "weights-are-cut": Odd(
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000]),
        ("the weights cannot be read",),
        place="weights",
    ),
    "tensor-missing": Odd(
        _weights(lambda tensors: tensors.pop(FIRST_NORM)),
        ("tensors that the architecture needs are missing", FIRST_NORM),
        place="weights",
    ),
    "head-missing": Odd(
        _weights(lambda tensors: tensors.pop("lm_head.weight")), ("are missing: lm_head.weight",), place="weights"
    ),
    "tensors-unknown": Odd(
        _weights(lambda tensors: tensors.update({f"visual.{index}.weight": torch.ones(2) for index in range(5)})),
        ("not of this architecture: visual.0.weight", "and 2 more"),
        place="weights",
    ),
    "one-layer-more": Odd(
        _config(num_hidden_layers=2), ("not of this architecture: model.layers.2.",), place="weights"
    ),
    "tensor-of-another-shape": Odd(
        _weights(lambda tensors: tensors.update({FIRST_NORM: torch.ones(7)})),
        (f"{FIRST_NORM} is [7], not [64]",),
        place="weights",
    ),
    "tensor-of-integers": Odd(
        _weights(lambda tensors: tensors.update({FIRST_NORM: torch.ones(64, dtype=torch.int8)})),
        (f"{FIRST_NORM} is stored as I8", "BF16"),
        place="weights",
    ),
    "tokenizer-is-a-pointer": Odd(
        _pointer("tokenizer.json"), ("tokenizer.json is a Git LFS pointer", "git lfs pull"), place="weights"
    ),
    "template-is-a-pointer": Odd(
        _pointer("chat_template.jinja"), ("chat_template.jinja is a Git LFS pointer",), place="weights"
    ),
    "no-tokenizer": Odd(_without("tokenizer*"), ("no tokenizer there", "tokenizer.json is needed"), place="tokenizer"),
    "tokenizer-without-vocabulary": Odd(
        _both(_without("tokenizer.json"), _tokenizer_config(tokenizer_class="LlamaTokenizer")),
        ("no tokenizer there",),
        place="tokenizer",
    ),
    "sentencepiece-alone": Odd(
        _both(_without("tokenizer.json"), lambda folder: (folder / "tokenizer.model").write_bytes(b"\n\x05model")),
        ("tokenizer.model, a SentencePiece model alone", "tokenizer.json", "save_pretrained"),
        place="tokenizer",
    ),
    "tokenizer-is-cut": Odd(
        lambda folder: (folder / "tokenizer.json").write_text('{"model": {"type": "Own"}'),
        ("the tokenizer cannot be read",),
        place="tokenizer",
    ),
    "tokenizer-of-another-kind": Odd(
        lambda folder: (folder / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "Own"}}'),
        ("the tokenizer cannot be read",),
        place="tokenizer",
    ),
    "tokenizer-of-its-own": Odd(
        _tokenizer_config(tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]}),
        ("the tokenizer 'OwnTokenizer' needs Python code", "never run"),
        place="tokenizer",
    ),
    "broken-template": Odd(
        _template("{{ bos_token }}\n{% for m in messages %}{{ m['content'] }}"),
        ("the chat template fails in line 2", "endfor"),
        place="tokenizer",
    ),
    "template-with-an-unknown-filter": Odd(
        _template("{{ messages | own_filter }}"), ("the chat template fails in line 1", "own_filter"), place="tokenizer"
    ),
    "template-that-refuses-all": Odd(
        _template("{{ raise_exception('not today') }}"), ("the chat template fails", "not today"), place="tokenizer"
    ),
    "template-without-end": Odd(
        _template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        ("the chat template fails on a plain chat", "1 s of processor time"),
        place="tokenizer",
    ),
    "named-templates-without-default": Odd(
        _named_templates("rag", "tool_use"), ("(rag, tool_use)", "'default'"), place="tokenizer"
    ),
    "eos-as-text": Odd(
        lambda folder: change_json(folder / "generation_config.json", eos_token_id="</s>"),
        ("generation_config.json: eos_token_id must be a token id", "'</s>'"),
        place="serving",
    ),
}

SOUND: dict[str, Callable[[Path], object]] = {
    "own-code-of-a-known-type": _config(auto_map=OWN_CODE),
    "attention-of-its-own": _config(attn_implementation="own/kernels", _attn_implementation="own/kernels"),
    "flags-of-outputs": _config(return_dict=False, output_attentions=True, output_hidden_states=True),
    "tokenizer-of-a-known-class": _tokenizer_config(
        tokenizer_class="PreTrainedTokenizerFast", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]}
    ),
    "pickle-beside": lambda folder: (folder / "pytorch_model.bin").write_bytes(
        pickle.dumps(_Payload(folder.parent / MARKER))
    ),
    "in-shards": in_shards,
    "old-rotary-buffers": _weights(
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    ),
    "named-templates": _named_templates("default", "rag"),
    "no-template": _without("chat_template.jinja"),
}
