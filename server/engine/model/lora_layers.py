"""Puts adapters into a transformers model: linear layers that read one input become one group. Knows no requests.

transformers' own forward stays untouched. It still calls q_proj(x), k_proj(x) and v_proj(x) one after the other, but
each of them is now a `GroupMember` of one `LinearGroup`. The first member that is called computes all three products in
one launch and keeps them; the others return their part. How does a member know that the kept result belongs to its x?
It compares the *identity* of the tensor: `self.input is x`. This holds because a layer passes the same tensor object to
all members of a group, in the group's order. The last member clears the kept input and result. So no stale result can
meet a new tensor, and nothing stays alive between layers. A model that passed copies would only lose the saving: every
member would compute the whole group again, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.integrations.moe import _grouped_mm
from transformers.pytorch_utils import Conv1D

from adapters_store.base.description import BaseDescription
from adapters_store.base.families import HEAD, family_of
from adapters_store.base.files import DTYPES
from lora_kernels.elementwise.launcher import silu_mul
from lora_kernels.lora.batch import ExpertsBatch, LoraBatch, LoraGroup
from lora_kernels.lora.launcher import add_lora_delta, expert_linear, group_linear, has_expert_kernel, own_head_rows
from lora_kernels.lora.repacked import is_repacked_here, repacked, repacked_experts
from lora_kernels.lora.token_rows import embed_own_rows
from lora_kernels.nf4.launcher import nf4_linear, on_nf4_kernel
from lora_kernels.nf4.weight import Nf4Weight, nf4_weights
from lora_kernels.self_test import check_before_use
from server.engine.model.norms import fuse_norms
from server.engine.model.rope import fuse_rope


@dataclass(slots=True)
class LoraState:
    """The step's adapters, for every wrapped layer. The runner sets it before the forward. None: base only.

    head: the adapters of the rows with logits (the head runs on those alone).
    """

    layers: LoraBatch | None = None
    head: LoraBatch | None = None


class LinearGroup:
    """Linear layers that read the same input, computed together when the first of them is called."""

    def __init__(
        self,
        linears: Sequence[nn.Module],
        group: LoraGroup,
        state: LoraState,
        *,
        is_head: bool,
        embedding_VH: torch.Tensor | None = None,
    ) -> None:
        """embedding_VH: the model's; a head that shares its memory keeps its rows as they lie."""
        self.group = group
        self.state = state
        self.is_head = is_head
        self._dtype = torch.float32 if is_head else None  # rounded logits would tie, and ties decide greedy answers
        self.input: torch.Tensor | None = None
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.quantized = [] if all(type(linear) in (nn.Linear, Conv1D) for linear in linears) else list(linears)
        if not self.quantized:
            self.weight, self.bias = _fused(linears)
            is_shared = embedding_VH is not None and self.weight.data_ptr() == embedding_VH.data_ptr()
            if not is_shared and is_repacked_here(self.weight):
                self.weight = repacked(self.weight)

    def output_of(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Member `index`'s output for x [..., H]. Members are called in order with the same tensor (see above)."""
        if self.input is not x:
            self.input = x
            self.outputs = torch.split(self(x), list(self.group.out_features), dim=-1)
        output = self.outputs[index]
        if index == len(self.outputs) - 1:
            self.input, self.outputs = None, ()
        return output

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """All members' outputs side by side, [..., sum(out_features)]."""
        y_TO = self._compute(x.reshape(-1, self.group.in_features))
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @property
    def resident(self) -> tuple[torch.Tensor, ...]:
        if not self.quantized:
            return (self.weight,) if self.bias is None else (self.weight, self.bias)
        return tuple(parameter for linear in self.quantized for parameter in linear.parameters())

    def _compute(self, x_TH: torch.Tensor) -> torch.Tensor:
        batch = self.state.head if self.is_head else self.state.layers
        if not self.quantized:
            y_TO = group_linear(x_TH.contiguous(), self.weight, self.bias, batch, self.group, dtype=self._dtype)
        else:
            y_TO = add_lora_delta(self._quantized_base(x_TH), x_TH, batch, self.group, self._quantized_bias)
        if self.is_head and batch is not None and batch.token_segments:
            own_head_rows(y_TO, x_TH, batch, self.group)
        return y_TO

    @cached_property
    def _quantized_bias(self) -> torch.Tensor | None:
        biases = [bias for linear in self.quantized if isinstance(bias := linear.bias, torch.Tensor)]
        return torch.cat([bias.detach() for bias in biases]) if biases else None

    @cached_property
    def _nf4_weights(self) -> list[Nf4Weight]:
        return nf4_weights([linear.get_parameter("weight") for linear in self.quantized])

    def _quantized_base(self, x_TH: torch.Tensor) -> torch.Tensor:
        if on_nf4_kernel(x_TH) and self._nf4_weights:
            biases = [bias if isinstance(bias := linear.bias, torch.Tensor) else None for linear in self.quantized]
            return nf4_linear(x_TH, self._nf4_weights, biases)
        parts = [linear(x_TH) for linear in self.quantized]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=-1)


def _fused(linears: Sequence[nn.Module]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The members' weights, stacked. A group of one keeps its own tensor (the head may be tied)."""
    weights = [_weight(linear) for linear in linears]
    biases = [bias.detach() for linear in linears if isinstance(bias := linear.bias, torch.Tensor)]
    assert len(biases) in (0, len(linears)), "a group's layers all have a bias or none has"
    if len(linears) == 1:
        return weights[0], biases[0] if biases else None
    return torch.cat(weights), torch.cat(biases) if biases else None


def _weight(linear: nn.Module) -> torch.Tensor:
    """[out_features, in_features]"""
    weight = linear.get_parameter("weight").detach()
    return weight.T.contiguous() if isinstance(linear, Conv1D) else weight


class GroupMember(nn.Module):
    """Replaces one linear layer in the model."""

    def __init__(self, group: LinearGroup, index: int) -> None:
        super().__init__()
        self.group = group
        self._index = index

    @property
    def resident(self) -> tuple[torch.Tensor, ...]:
        """The weights behind this member, for counting bytes."""
        return self.group.resident

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.output_of(self._index, x)


class FusedSwiGLU(nn.Module):
    """Replaces a gate/up/down MLP with SiLU."""

    def __init__(self, gate_up: LinearGroup, down: LinearGroup) -> None:
        super().__init__()
        self._gate_up = gate_up
        self._down = down

    @property
    def resident(self) -> tuple[torch.Tensor, ...]:
        """The weights inside, for counting bytes."""
        return (*self._gate_up.resident, *self._down.resident)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(silu_mul(self._gate_up(x)))


class AdapterEmbedding(nn.Module):
    """Replaces the base's token embedding: adapters may have rows of their own in it, or LoRA."""

    def __init__(self, base: nn.Module, state: LoraState) -> None:
        super().__init__()
        self.base = base
        self._state = state
        scale = getattr(base, "embed_scale", None)  # Gemma's embedding multiplies its rows
        self._scale = 1.0 if scale is None else float(scale.to(base.get_parameter("weight").dtype))

    @property
    def num_embeddings(self) -> int:
        return int(self.base.num_embeddings)  # type: ignore[arg-type]

    @property
    def weight(self) -> torch.Tensor:
        """The base's own rows."""
        return self.base.get_parameter("weight")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [..., T]. Returns [..., T, H]."""
        embedded: torch.Tensor = self.base(ids)
        batch = self._state.layers
        if batch is not None and batch.token_segments:
            rows_TH = embedded.view(-1, embedded.shape[-1])
            ids_T, segments, arena = ids.reshape(-1), batch.token_segments, batch.table.arena
            embed_own_rows(rows_TH, ids_T, segments, arena, vocabulary=self.num_embeddings, scale=self._scale)
        return embedded


class AdapterRouter(nn.Module):
    """Replaces what scores a layer's experts. transformers' own code ranks the scores: a copy whose weight is the
    identity, which leaves each score as it is, bit by bit."""

    def __init__(self, base: nn.Module, group: LoraGroup, state: LoraState) -> None:
        super().__init__()
        self.base = base
        self._group = group
        self._state = state
        weight = base.get_parameter("weight")
        self._ranks = deepcopy(base)
        self._ranks.weight = nn.Parameter(torch.eye(len(weight), dtype=weight.dtype, device=weight.device), False)
        setattr(self._ranks, "hidden_dim", len(weight))  # noqa: B010  (no attribute that torch declares)

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, group = self._state.layers, self._group
        if not has_expert_kernel(x_TH) and (batch is None or not batch.touches(group)):
            own: tuple[torch.Tensor, ...] = self.base(x_TH)
            return own
        scores_TE = group_linear(x_TH, self.base.get_parameter("weight"), None, batch, group)
        ranked: tuple[torch.Tensor, ...] = self._ranks(scores_TE)
        return ranked


class AdapterExperts(nn.Module):
    """Replaces a layer's experts: each row's products and its own adapter's deltas, summed as transformers sums them.
    If no kernel of ours makes the products, a step whose adapters change none runs transformers' own forward.

    first_rows: of the table, of gate_up_proj's experts and of down_proj's.
    Legend: T tokens, E rows: one for each token and each of its experts, sorted by expert. H hidden, I intermediate.
    """

    def __init__(self, base: nn.Module, first_rows: tuple[int, int], state: LoraState) -> None:
        super().__init__()
        self.base = base
        self._state = state
        weights = {name: base.get_parameter(name).detach() for name in ("gate_up_proj", "down_proj")}
        self._num_experts = len(weights["down_proj"])
        self._groups = tuple(
            LoraGroup((row,), weight.shape[2], (weight.shape[1],))
            for row, weight in zip(first_rows, weights.values(), strict=True)
        )
        self._weights = tuple(_in_order(base, name, weight) for name, weight in weights.items())
        self._activation = base.get_submodule("act_fn")
        self._is_silu = _is_silu(self._activation)

    def forward(self, x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """experts_TK: which K experts each token has; weights_TK: of their outputs. Returns [T, H]."""
        batch, on_kernel = self._state.layers, has_expert_kernel(x_TH)
        if batch is not None and not batch.has_experts:
            batch = None
        if batch is None and not on_kernel:
            own: torch.Tensor = self.base(x_TH, experts_TK, weights_TK)
            return own
        routed, order = _routed(batch, experts_TK, self._num_experts)
        order_E = torch.from_numpy(order).to(x_TH.device)
        gate_up_E2I = self._product(0, x_TH[order_E // experts_TK.shape[1]], routed)
        if on_kernel and self._is_silu:
            inner_EI = silu_mul(gate_up_E2I)
        else:
            gate_EI, up_EI = gate_up_E2I.chunk(2, dim=-1)
            inner_EI = self._activation(gate_EI) * up_EI
        y_EH = self._product(1, inner_EI, routed)
        by_token_EH = torch.empty_like(y_EH)
        by_token_EH[order_E] = y_EH
        weighed_TKH = by_token_EH.view(*experts_TK.shape, -1) * weights_TK[:, :, None]
        return weighed_TKH.sum(dim=1).to(x_TH.dtype)

    def _product(self, index: int, x_E: torch.Tensor, routed: _Routed) -> torch.Tensor:
        """Of the layer's first or second parameter, with each row's own adapter's delta."""
        weight, group = self._weights[index], self._groups[index]
        if has_expert_kernel(x_E):
            return expert_linear(x_E, weight, routed.starts, routed.batch, group)
        ends = torch.from_numpy(routed.starts[1:]).int().to(x_E.device)
        return add_lora_delta(_grouped_mm(x_E, weight.transpose(-2, -1), offs=ends), x_E, routed.batch, group)


def _in_order(base: nn.Module, name: str, weight_XOH: torch.Tensor) -> torch.Tensor:
    """Repacked, if the CPU reads it so. It takes the parameter's place, so that the other is freed."""
    in_order = repacked_experts(weight_XOH)
    if in_order is None:
        return weight_XOH
    base.register_parameter(name, nn.Parameter(in_order, requires_grad=False))
    return in_order


@dataclass(frozen=True, slots=True)
class _Routed:
    """A layer's rows of experts, on the host. starts [X + 1]: of each expert's rows. batch: None: no adapter changes
    experts."""

    starts: NDArray[np.int64]
    batch: ExpertsBatch | None


def _routed(batch: LoraBatch | None, experts_TK: torch.Tensor, count: int) -> tuple[_Routed, NDArray[np.int64]]:
    """And which row of experts_TK, as one axis, each of them is."""
    expert_E = experts_TK.reshape(-1).cpu().numpy()
    order = np.argsort(expert_E, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(expert_E, minlength=count))])
    tokens_E = order // experts_TK.shape[1]
    return _Routed(starts, None if batch is None else batch.of_experts(expert_E[order], tokens_E, count)), order


MakeGroup = Callable[[tuple[str, ...]], Callable[..., LinearGroup]]
"""Paths of layers that read one input -> what makes their group, called as `LinearGroup` is."""


def wrap_model(model: nn.Module, base: BaseDescription, make_group: MakeGroup | None = None) -> LoraState:
    """Replace the linear layers by groups that add each row's own adapter, and norms, SwiGLU, RoPE by fused forms.
    On a GPU, every kernel is tested there before the model can use it. make_group None: every layer is whole."""
    check_before_use(next(model.parameters()).device, DTYPES[base.dtype])
    state, family = LoraState(), family_of(base.architecture)
    embedding_VH = model.get_submodule(family.embedding).get_parameter("weight")
    for paths in base.groups:
        linears = [model.get_submodule(path) for path in paths]
        shapes = [base.modules[path] for path in paths]
        rows = tuple(base.module_index[path] for path in paths)
        group = LoraGroup(rows, shapes[0].in_features, tuple(shape.out_features for shape in shapes))
        if family.is_router(paths[0]):
            model.set_submodule(paths[0], AdapterRouter(linears[0], group, state))
            continue
        make = LinearGroup if make_group is None else make_group(paths)
        joined = make(linears, group, state, is_head=paths == (HEAD,), embedding_VH=embedding_VH)
        for index, path in enumerate(paths):
            model.set_submodule(path, GroupMember(joined, index))
    stacks = list(base.experts)
    for first, second in zip(stacks[::2], stacks[1::2], strict=True):
        path, rows = first.rpartition(".")[0], (base.first_row_of(first), base.first_row_of(second))
        model.set_submodule(path, AdapterExperts(model.get_submodule(path), rows, state))
    fuse_norms(model)
    _replace_swiglus(model)
    fuse_rope(model)
    return state


def _replace_swiglus(model: nn.Module) -> None:
    for path, module in list(model.named_modules()):
        children = dict(module.named_children())
        if set(children) == {"gate_proj", "up_proj", "down_proj", "act_fn"} and _is_silu(children["act_fn"]):
            gate, down = children["gate_proj"], children["down_proj"]
            if not isinstance(gate, GroupMember) or not isinstance(down, GroupMember):
                continue  # one of the few dense layers among layers of experts
            model.set_submodule(path, FusedSwiGLU(gate.group, down.group))


@torch.inference_mode()
def _is_silu(activation: nn.Module) -> bool:
    probe = torch.linspace(-8, 8, 65)
    return torch.equal(activation(probe), torch.nn.functional.silu(probe))
