"""Loads a model sharded over the ranks (FSDP2). Knows files, rows and quantisation; no training.

The model is built without memory (meta), cut with `fully_shard`, and filled: each rank reads its own rows of each
tensor from the base's files. For NF4 a rank reads one whole tensor at a time, quantises it and keeps its rows, so that
blocks and scales are those of one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapters_store.base.converted.shards import opened_weights
from adapters_store.base.families import HEAD, UnsupportedBase
from adapters_store.base.files import DTYPES, load_config
from adapters_store.base.nf4 import keep_nf4_weights_plain, make_linears_4bit, quantized
from trainer.model.attention import register_packed_attention
from trainer.model.model import LossModel, Trainee, prepare, refuse_stored_nf4
from trainer.model.ranks import Ranks
from trainer.spec import TrainSpec

NF4_BYTES_PER_VALUE = 2  # values that share a byte


def load_sharded(spec: TrainSpec, ranks: Ranks) -> Trainee:
    """This rank's share of base and adapter. Raises what `trainer.model.model.load` raises."""
    refuse_stored_nf4(spec)
    dtype = DTYPES[spec.precision]
    causal = _skeleton(spec, torch.float32 if spec.method == "full" else dtype)
    if spec.method == "qlora":
        make_linears_4bit(causal, _linears(causal), dtype)
        causal.is_loaded_in_4bit = True
        keep_nf4_weights_plain(causal)
    module = LossModel(prepare(causal, spec, ranks.device))
    packed = _declare_packed_weights(module)
    _shard(module, spec, ranks)
    _give_memory(module, ranks.device)
    with opened_weights(spec.base) as files:
        _fill(module, packed, files, ranks)
    return Trainee(module, ranks.device, dtype)


def _skeleton(spec: TrainSpec, dtype: torch.dtype) -> PreTrainedModel:
    """The base without its weights; buffers (rotary frequencies) are real."""
    with init_empty_weights(include_buffers=False):
        causal = AutoModelForCausalLM.from_config(
            load_config(spec.base),
            trust_remote_code=False,
            dtype=dtype,
            attn_implementation=register_packed_attention(),
        )
    causal.tie_weights()
    return causal


def _linears(causal: PreTrainedModel) -> list[str]:
    """What transformers quantises when it loads NF4: every linear layer but the head."""
    return [name for name, module in causal.named_modules() if type(module) is nn.Linear and name != HEAD]


def _declare_packed_weights(module: nn.Module) -> dict[str, Any]:
    """Give 4-bit layers the shape that is sharded, [values / 2, 1] bytes. Returns them by their weight's name."""
    layers = {f"{name}.weight": layer for name, layer in module.named_modules() if hasattr(layer, "quant_state")}
    for layer in layers.values():
        num_bytes = layer.in_features * layer.out_features // NF4_BYTES_PER_VALUE
        empty = torch.empty(num_bytes, 1, dtype=torch.uint8, device="meta")
        layer.weight = nn.Parameter(empty, requires_grad=False)
    return layers


def _shard(module: LossModel, spec: TrainSpec, ranks: Ranks) -> None:
    """A group for each decoder layer, one for the rest, which stays whole from forward to backward."""
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if spec.method == "full" and spec.precision == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in module.layers:
        fully_shard(layer, mesh=ranks.mesh, reshard_after_forward=spec.reshard_after_forward, mp_policy=policy)
    fully_shard(module, mesh=ranks.mesh, reshard_after_forward=False, mp_policy=policy)


def _give_memory(module: nn.Module, device: torch.device) -> None:
    """Memory for this rank's shares, still empty, and buffers on the device."""

    def placed(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    module._apply(placed)


@torch.no_grad()
def _fill(module: LossModel, packed: dict[str, Any], files: dict[str, Any], ranks: Ranks) -> None:
    """files: the open file of each of the base's tensors. Raises UnsupportedBase if the base lacks one."""
    for name, parameter in _base_parameters(module):
        assert isinstance(parameter, DTensor)
        local = parameter.to_local()
        per_rank = -(-parameter.shape[0] // ranks.world_size)
        start = min(ranks.rank * per_rank, parameter.shape[0])
        stop = start + local.shape[0]
        stored = _file_name(name)
        if stored not in files:
            raise UnsupportedBase(f"the base has no tensor {stored} in its safetensors files")
        if name in packed:
            local.copy_(_quantized(packed[name], files[stored].get_tensor(stored), ranks.device)[start:stop])
        else:
            local.copy_(files[stored].get_slice(stored)[start:stop])


def _base_parameters(module: LossModel) -> Iterator[tuple[str, nn.Parameter]]:
    """All but the adapter's own, a tied one once."""
    return ((name, weight) for name, weight in module.named_parameters() if ".lora_" not in name)


def _file_name(name: str) -> str:
    """ "net.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight" -> "model.layers.0.mlp.up_proj.weight"."""
    return name.removeprefix("net.").removeprefix("base_model.model.").replace(".base_layer.", ".")


def _quantized(layer: Any, weight: Tensor, device: torch.device) -> Tensor:
    """bitsandbytes' packed bytes of the whole weight; the layer remembers the scales, which every rank needs whole."""
    packed: Tensor
    packed, layer.quant_state = quantized(weight.to(device, layer.compute_dtype))
    return packed
