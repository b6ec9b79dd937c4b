"""Loads one rank's part of a base. Knows tensors and transformers' modules; knows no adapters and no requests.

Embedding and norms are whole on every rank; the head is the first rank's alone.
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

from adapters_store.base.description import BaseDescription
from adapters_store.base.families import HEAD
from adapters_store.base.files import DTYPES, describe_base, load_config
from adapters_store.base.nf4 import is_stored_in_nf4
from lora_kernels.lora.batch import LoraGroup
from server.engine.model.attention_hook import register_paged_attention
from server.engine.model.base_model import BaseModel, wrap_base
from server.engine.model.lora_layers import LinearGroup, LoraState
from server.engine.tensor_parallel.cuts import INPUTS, OUTPUTS, Cuts
from server.engine.tensor_parallel.part_loader import Part, load_part, refuse_divided_blocks
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


def cuts_of(
    path: Path, num_ranks: int, *, dtype: str = "auto", quantize: str | None = None, name: str | None = None
) -> Cuts:
    """How a base in a local folder is divided; reads no weights. quantize: as for `load_base`. Raises
    UnsupportedBase."""
    description, config = describe_base(path, dtype=dtype, name=name), load_config(path)
    is_stored = is_stored_in_nf4(config)
    cuts = Cuts(replace(description, nf4=quantize == "nf4" and not is_stored), config, num_ranks)
    if is_stored or cuts.base.nf4:
        refuse_divided_blocks(cuts)
    return cuts


def load_shard(path: Path, cuts: Cuts, ranks: Ranks) -> BaseModel:
    """This rank's part. Raises UnsupportedBase."""
    description = cuts.base
    dtype, part = DTYPES[description.dtype], Part(cuts, ranks.rank, ranks.device)
    model = load_part(path, part, dtype, attn_implementation=register_paged_attention())
    model.eval().requires_grad_(False)
    _complete_sums(model, cuts, ranks)
    config = cuts.config_of_rank(model.config)
    _cut_attention(model, config, cuts, ranks)
    layers = cuts.layers if ranks.rank == 0 else _without_head(model, cuts.layers)
    model.to(ranks.device)
    make_group = partial(_group_of, cuts, ranks)
    base = wrap_base(model, description, ranks.device, dtype, layers=layers, make_group=make_group)
    return replace(base, config=config)


def _group_of(cuts: Cuts, ranks: Ranks, paths: tuple[str, ...]) -> Callable[..., LinearGroup]:
    cut = cuts.by_name.get(paths[0])
    return LinearGroup if cut is None or cut.dim == OUTPUTS else partial(SummedGroup, ranks=ranks)


def _complete_sums(model: nn.Module, cuts: Cuts, ranks: Ranks) -> None:
    """Biases of layers whose outputs are summed are the first rank's alone; experts' outputs are summed too."""
    for name, cut in cuts.by_name.items():
        if ranks.rank > 0 and cut.dim == INPUTS and name in cuts.base.modules:
            linear: Any = model.get_submodule(name)
            linear.bias = None
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
