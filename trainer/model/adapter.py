"""The adapter on the base: PEFT's layers, made from the spec, started from a seed, written in PEFT's format.

Knows PEFT; knows no data. What it writes names the base it fits (`multilora_base_digest`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from adapters_store.filesystem import file_sha256
from adapters_store.format.chat_fields import DIALECT_FIELD, DTYPE_FIELD, TEMPLATE_FIELD
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.parsing.patterns import SuffixPatterns, suffixes_at_dots
from trainer.spec import AdapterSpec, SpecError, TrainSpec

NAME = "default"  # PEFT's own name for a model's only adapter
LINEARS = ("Linear", "Linear4bit", "Conv1D")  # GPT-2's layers are the last
_PREFIX = "base_model.model."
_UNFIT_FOR_EXPERTS = ("ParamWrapper does not work", "unsupported variant combination")  # PEFT's ValueErrors
_BASE_DIGEST = "multilora_base_digest"  # in the weights' metadata


def attach_adapter(causal: PreTrainedModel, spec: TrainSpec, device: torch.device) -> PeftModel:
    """Wrap the target layers. Raises SpecError for a target or pattern that fits no layer of the base, and for what
    experts cannot have."""
    adapter = spec.adapter
    linears = [name for name, module in causal.named_modules() if type(module).__name__ in LINEARS]
    check_names(adapter, linears)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=_whole_where_possible(adapter.scaled_alpha),
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules if isinstance(adapter.target_modules, str) else [*adapter.target_modules],
        use_rslora=adapter.rslora,
        use_dora=spec.method == "dora",
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern={key: _whole_where_possible(value) for key, value in adapter.alpha_pattern.items()},
        init_lora_weights="eva" if adapter.init == "eva" else True,
        eva_config=EvaConfig() if adapter.init == "eva" else None,
        task_type="CAUSAL_LM",
        alora_invocation_tokens=list(adapter.invocation) or None,
    )
    try:
        peft = get_peft_model(causal, config)
    except ValueError as error:
        if any(text in str(error) for text in _UNFIT_FOR_EXPERTS):
            raise _unfit_for_experts(spec) from None
        raise
    if adapter.init != "default":
        _refuse_experts(peft, adapter.init)
    start_from_seed(peft, adapter, spec.seed, device)
    if spec.initial_adapter is not None:
        _start_from_adapter(peft, spec.initial_adapter)
    return peft


def _unfit_for_experts(spec: TrainSpec) -> SpecError:
    """Names what PEFT does not have for experts: DoRA, dropout, or an activated LoRA."""
    field, value, fit = "adapter.alora_invocation_tokens", str(list(spec.adapter.invocation)), "absent"
    if spec.method == "dora":
        field, value, fit = "method", "dora", "lora or qlora"
    elif spec.adapter.dropout:
        field, value, fit = "adapter.dropout", str(spec.adapter.dropout), "0"
    return SpecError(field, value, f"{fit} where experts are trained; or name target_modules without experts")


def _refuse_experts(peft: PeftModel, init: str) -> None:
    """Orthogonal: A and B hold the ranks of all experts, their product is zero, each expert's own is not. EVA: inputs
    of an expert are not those of its layer."""
    for name, module in peft.named_modules():
        if isinstance(module, LoraLayer) and getattr(module, "num_experts", 1) > 1:
            wanted = f"default where experts are trained, and target_modules match {name.removeprefix(_PREFIX)}"
            raise SpecError("adapter.init", init, wanted)


def _start_from_adapter(peft: PeftModel, folder: Path) -> None:
    """Raises SpecError unless the adapter has exactly the tensors of this base's layers, all finite."""
    given = load_file(folder / WEIGHTS_FILE)
    wanted = adapter_tensors(peft)
    odd = sorted(given.keys() ^ wanted.keys()) or [key for key in wanted if given[key].shape != wanted[key].shape]
    odd = odd or [key for key, tensor in given.items() if not bool(torch.isfinite(tensor).all())]
    if odd:
        message = "an adapter whose tensors are finite and fit the base's layers, each of them"
        raise SpecError("initial_adapter", odd[0], message)
    set_peft_model_state_dict(peft, given, adapter_name=NAME)


def digest_of(folder: Path, base_digest: str) -> str:
    """Of the weights. Raises SpecError if they name another base than base_digest."""
    path = folder / WEIGHTS_FILE
    with safe_open(path, framework="pt") as opened:
        named = (opened.metadata() or {}).get(_BASE_DIGEST, base_digest)
    if named != base_digest:
        raise SpecError("initial_adapter", named, f"an adapter of the base {base_digest}")
    return f"sha256:{file_sha256(path)}"


def check_names(adapter: AdapterSpec, linears: Iterable[str]) -> None:
    """Every entry of target_modules and of the patterns must match at least one linear layer."""
    linears = list(linears)
    known = {suffix for name in linears for suffix in suffixes_at_dots(name)}
    if not isinstance(adapter.target_modules, str):
        for entry in adapter.target_modules:
            if entry not in known:
                raise SpecError("adapter.target_modules", entry, f"linear layers of the base: {_last_parts(linears)}")
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(adapter, field):
            pattern = SuffixPatterns([(key, True)])
            if not any(pattern.find(name, False) for name in linears):
                raise SpecError(f"adapter.{field}", key, f"linear layers of the base: {_last_parts(linears)}")


def _last_parts(names: list[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _whole_where_possible(value: float) -> float:
    return int(value) if value == int(value) else value


def start_from_seed(peft: PeftModel, adapter: AdapterSpec, seed: int, device: torch.device) -> None:
    """Draw A (and B) again on the CPU, layer after layer: the same start on any device and any number of ranks."""
    torch.manual_seed(seed)
    for layer in [module for module in peft.modules() if isinstance(module, LoraLayer)]:
        for part in (layer.lora_A, layer.lora_B):
            part[NAME] = part[NAME].to_empty(device="cpu").float()
        layer.reset_lora_parameters(NAME, True)
        if adapter.init == "orthogonal":
            _make_orthogonal(layer)
        for part in (layer.lora_A, layer.lora_B):
            part[NAME] = part[NAME].to(device)


@torch.no_grad()
def _make_orthogonal(layer: LoraLayer) -> None:
    """A and B of full size whose product is zero: A comes from the odd, B from the even rows of a random rotation.

    The formula of peft's LoraLayer.orthogonal_init, which casts to the base's type and so cannot start on NF4.
    Source: https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation
    """
    a_RI, b_OR = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    rank = len(a_RI)
    rotation, _ = torch.linalg.qr(torch.randn(rank, rank))
    a_RI.copy_((torch.randn(a_RI.shape[1], rank // 2) @ rotation[0::2]).T / 10)
    b_OR.copy_(torch.randn(b_OR.shape[0], rank // 2) @ rotation[1::2] / 10)


def adapter_tensors(peft: PeftModel, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter as PEFT names it. state: the whole parameters under sharding, named as in the PeftModel."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        peft, state_dict=state, adapter_name=NAME, save_embedding_layers=False
    )
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_adapter(
    peft: PeftModel, tensors: dict[str, Tensor], folder: Path, *, spec: TrainSpec, base_digest: str
) -> None:
    """adapter_config.json and adapter_model.safetensors. The base is named, its path is not. base_digest goes into the
    weights' metadata: PEFT warns of fields of a config that it does not know. Tool dialect and chat template must be
    such fields: the server reads them there."""
    metadata = {"format": "pt", _BASE_DIGEST: base_digest}
    save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
    config = peft.peft_config[NAME]
    config.save_pretrained(folder)
    path = folder / CONFIG_FILE
    body: dict[str, Any] = json.loads(path.read_text())
    body |= {"base_model_name_or_path": spec.base.resolve().name, "inference_mode": True}
    own = {
        DIALECT_FIELD: spec.tool_dialect,
        TEMPLATE_FIELD: spec.chat_template,
        DTYPE_FIELD: spec.adapter_dtype,
    }
    body |= {field: value for field, value in own.items() if value is not None}
    path.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")
