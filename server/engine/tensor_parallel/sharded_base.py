"""Loads one rank's part of a base. Knows tensors and transformers' modules; knows no adapters and no requests.

The base is read whole into host memory, cut there, and only the part goes to the device. Embedding and norms are whole
on every rank; the head is the first rank's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from adapters_store.base.description import BaseDescription
from adapters_store.base.families import HEAD, UnsupportedBase
from adapters_store.base.files import DTYPES, describe_base, load_config
from adapters_store.base.nf4 import is_stored_in_nf4
from adapters_store.base.weights import load_causal
from lora_kernels.lora.batch import LoraGroup
from server.engine.model.attention_hook import register_paged_attention
from server.engine.model.base_model import BaseModel, wrap_base
from server.engine.model.lora_layers import LinearGroup, LoraState
from server.engine.tensor_parallel.cuts import OUTPUTS, Cuts
from server.engine.tensor_parallel.ranks import Ranks

HEAD_COUNTS = ("num_heads", "num_key_value_heads", "split_size")  # of attention modules that do not infer them
NORMS_OF_ALL_HEADS = ("q_norm", "k_norm")


class SummedGroup(LinearGroup):
    """Layers whose inputs are divided: the ranks' outputs, adapters' deltas among them, are summed."""

    def __init__(
        self, linears: list[nn.Module], group: LoraGroup, state: LoraState, *, ranks: Ranks, **options: Any
    ) -> None:
        super().__init__(linears, group, state, **options)
        self._ranks = ranks

    def _compute(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self._ranks.add(super()._compute(x_TH))


class NormOverRanks(nn.Module):
    """An RMSNorm over all heads of a layer, a part of which this rank has: the ranks sum their squares."""

    def __init__(self, weight: torch.Tensor, eps: float, ranks: Ranks) -> None:
        super().__init__()
        self._weight = weight
        self._eps = eps
        self._ranks = ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squares = self._ranks.add(x.float().square().sum(-1, keepdim=True))
        normed = x.float() * torch.rsqrt(squares / (x.shape[-1] * self._ranks.size) + self._eps)
        return (self._weight.float() * normed).to(x.dtype)


def cuts_of(path: Path, num_ranks: int, *, dtype: str = "auto", name: str | None = None) -> Cuts:
    """How a base in a local folder is divided; reads no weights. Raises UnsupportedBase."""
    description, config = describe_base(path, dtype=dtype, name=name), load_config(path)
    if is_stored_in_nf4(config):
        why = "its weights are stored in NF4, and only plain ones are divided; serve it on one device"
        raise UnsupportedBase(f"--tensor-parallel {num_ranks}: {description.name}: {why}")
    return Cuts(description, config, num_ranks)


def load_shard(path: Path, cuts: Cuts, ranks: Ranks) -> BaseModel:
    """This rank's part. Raises UnsupportedBase."""
    description = cuts.base
    torch_dtype, cpu = DTYPES[description.dtype], torch.device("cpu")
    model = load_causal(path, torch_dtype, cpu, attn_implementation=register_paged_attention())
    model.eval().requires_grad_(False)
    _cut_weights(model, cuts, ranks)
    config = cuts.config_of_rank(model.config)
    _cut_attention(model, config, cuts, ranks)
    layers = cuts.layers if ranks.rank == 0 else _without_head(model, cuts.layers)
    model.to(ranks.device)
    base = wrap_base(model, description, ranks.device, torch_dtype, layers=layers, make_group=_group_maker(cuts, ranks))
    return replace(base, config=config)


def _group_maker(cuts: Cuts, ranks: Ranks) -> Callable[[tuple[str, ...]], Callable[..., LinearGroup]]:
    def maker(paths: tuple[str, ...]) -> Callable[..., LinearGroup]:
        cut = cuts.by_name.get(paths[0])
        return LinearGroup if cut is None or cut.dim == OUTPUTS else partial(SummedGroup, ranks=ranks)

    return maker


def _cut_weights(model: nn.Module, cuts: Cuts, ranks: Ranks) -> None:
    for name, cut in cuts.by_name.items():
        if name in cuts.base.experts:
            _replace(model, name, cut.part(model.get_parameter(name), cut.dim + 1, ranks.rank))
            continue
        linear: Any = model.get_submodule(name)
        dim = 1 - cut.dim if isinstance(linear, Conv1D) else cut.dim  # Conv1D: [in_features, out_features]
        _replace(model, f"{name}.weight", cut.part(linear.weight, dim, ranks.rank))
        if linear.bias is not None and cut.dim == OUTPUTS:
            _replace(model, f"{name}.bias", cut.part(linear.bias, 0, ranks.rank))
        elif linear.bias is not None and ranks.rank > 0:
            linear.bias = None  # the first rank adds it
    blocks = {name.rpartition(".experts.")[0] for name in cuts.base.experts}
    for block in blocks:
        model.get_submodule(block).register_forward_hook(lambda module, inputs, output: ranks.add(output))


def _cut_attention(model: nn.Module, config: PretrainedConfig, cuts: Cuts, ranks: Ranks) -> None:
    """Give each attention module the heads of one rank."""
    for paths in cuts.attention_paths():
        attention: Any = model.get_submodule(paths[0].rpartition(".")[0])
        attention.config = config
        for name in HEAD_COUNTS:
            if hasattr(attention, name):
                setattr(attention, name, getattr(attention, name) // ranks.size)
        for name, path in zip(NORMS_OF_ALL_HEADS, paths, strict=False):
            norm = getattr(attention, name, None)
            if norm is not None and len(norm.weight) == cuts.base.modules[path].out_features != cuts.head_dim:
                weight = cuts.by_name[path].part(norm.weight.detach(), 0, ranks.rank).to(ranks.device)
                setattr(attention, name, NormOverRanks(weight, norm.variance_epsilon, ranks))


def _without_head(model: nn.Module, layers: BaseDescription) -> BaseDescription:
    model.set_submodule(HEAD, nn.Identity())
    return replace(layers, groups=tuple(group for group in layers.groups if group != (HEAD,)))


def _replace(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, nn.Parameter(tensor.detach(), requires_grad=False))
