"""Which part of each layer a rank holds. Knows shapes and names; knows no processes.

A layer whose outputs are divided (q/k/v, gate and up) needs no sum: each rank computes whole heads, or its part of the
inner width. The layer that reads them (o, down) has its inputs divided, and the ranks' outputs are summed. For an
adapter's A and B the same holds: y_i = W_i x + B_i (A x), and y = sum_i of W_i x_i + B (A_i x_i). So the base's own sum
carries the adapter, and there is no further one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import PretrainedConfig

from adapters_store.base.description import BaseDescription, ExpertsShape, LinearShape, expert_name
from adapters_store.base.families import Family, UnsupportedBase, family_of

QKV_IN_ONE = ("self_attn.qkv_proj", "attn.c_attn")  # queries, keys and values, one after the other
GATE_UP_IN_ONE = ("mlp.gate_up_proj", "mlp.experts.gate_up_proj")
OUTPUTS, INPUTS = 0, 1  # dimensions of a weight [out_features, in_features]


@dataclass(frozen=True, slots=True)
class Cut:
    """How one layer is divided. dim: of its weight. sizes: widths along dim that are divided each for itself."""

    dim: int
    sizes: tuple[int, ...]
    num_ranks: int

    def part(self, tensor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
        """A copy of the rank's part of a tensor whose dimension `dim` is the one that is divided."""
        parts = [each.chunk(self.num_ranks, dim)[rank] for each in tensor.split(self.sizes, dim)]
        return torch.cat(parts, dim)


@dataclass(frozen=True)
class Cuts:
    """How one base is divided among num_ranks. Raises UnsupportedBase, with the numbers, if it cannot be."""

    base: BaseDescription
    config: PretrainedConfig
    num_ranks: int

    def __post_init__(self) -> None:
        for name, count in (("attention heads", self._num_heads), ("key-value heads", self._num_kv_heads)):
            self._require_divisible(name, count)
        for name, cut in self.by_name.items():
            for size in cut.sizes:
                self._require_divisible(f"{name}: features", size)

    def _require_divisible(self, name: str, count: int) -> None:
        if count % self.num_ranks:
            message = f"{self.base.name} has {count} {name}, which {self.num_ranks} ranks cannot share evenly"
            raise UnsupportedBase(f"--tensor-parallel {self.num_ranks}: {message}")

    @cached_property
    def by_name(self) -> dict[str, Cut]:
        """Of every linear layer, and every parameter of experts, that is divided. The others are whole on each rank."""
        names = [*self.base.modules, *self.base.experts]
        return {name: cut for name in names if (cut := self._cut_of(name)) is not None}

    @cached_property
    def by_row(self) -> dict[str, Cut]:
        """The same for each row of the adapter table: each expert by itself."""
        rows = {name: cut for name, cut in self.by_name.items() if name in self.base.modules}
        for stack, shape in self.base.experts.items():
            rows |= {expert_name(stack, expert): self.by_name[stack] for expert in range(shape.num_experts)}
        return rows

    @cached_property
    def layers(self) -> BaseDescription:
        """The base with the shapes that its layers have on one rank."""
        modules = {name: LinearShape(*self._narrow(name, shape)) for name, shape in self.base.modules.items()}
        experts = {
            name: ExpertsShape(shape.num_experts, *self._narrow(name, shape))
            for name, shape in self.base.experts.items()
        }
        return replace(self.base, modules=modules, experts=experts)

    def config_of_rank(self, config: PretrainedConfig) -> PretrainedConfig:
        """A copy of the base's config with the heads of one rank."""
        config = copy.deepcopy(config)
        config.head_dim = self.head_dim
        config.num_attention_heads = self._num_heads // self.num_ranks
        if getattr(config, "num_key_value_heads", None):
            config.num_key_value_heads = self._num_kv_heads // self.num_ranks
        return config

    @property
    def family(self) -> Family:
        return family_of(self.base.architecture)

    @property
    def head_dim(self) -> int:
        own = getattr(self.config, "head_dim", None)
        return int(own or self.config.hidden_size // self._num_heads)

    def attention_paths(self) -> Iterable[tuple[str, ...]]:
        """The layers that make queries, keys and values, layer by layer."""
        first = self.family.layer_groups[0][0]
        return (group for group in self.base.groups if group[0].endswith(f".{first}"))

    @property
    def _num_heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def _num_kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self._num_heads)

    def _narrow(self, name: str, shape: LinearShape | ExpertsShape) -> tuple[int, int]:
        """in_features and out_features on one rank."""
        cut = self.by_name.get(name)
        num_in, num_out = (self.num_ranks if cut is not None and cut.dim == dim else 1 for dim in (INPUTS, OUTPUTS))
        return shape.in_features // num_in, shape.out_features // num_out

    def _cut_of(self, name: str) -> Cut | None:
        groups = (*self.family.layer_groups, *((each,) for each in self.family.experts))
        for index, group in enumerate(groups):
            if any(name.endswith(f".{suffix}") for suffix in group):
                dim = INPUTS if index % 2 else OUTPUTS  # each family's groups alternate
                return Cut(dim, self._sizes(name, dim), self.num_ranks)
        return None

    def _sizes(self, name: str, dim: int) -> tuple[int, ...]:
        shape = self.base.modules[name] if name in self.base.modules else self.base.experts[name]
        if dim == INPUTS:
            return (shape.in_features,)
        if name.endswith(QKV_IN_ONE):
            keys = self._num_kv_heads * self.head_dim
            return (shape.out_features - 2 * keys, keys, keys)
        if name.endswith(GATE_UP_IN_ONE):
            return (shape.out_features // 2,) * 2
        return (shape.out_features,)
