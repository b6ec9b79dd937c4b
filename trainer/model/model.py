"""The model a run trains: the base from a local folder, the adapter on it, the loss on top. Knows no data and no steps.

    load(spec, device) -> Trainee; trainee.loss(batch) -> summed nll; trainee.trained() -> the parameters that learn

precision "bfloat16": frozen weights bf16, trained weights float32, products in bf16 by autocast. "full" keeps every
weight in float32. "qlora": NF4 with double quantisation, products in the run's precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from adapters_store.base.families import family_of
from adapters_store.base.files import DTYPES, load_config
from adapters_store.base.nf4 import is_stored_in_nf4
from adapters_store.base.row_rope import RowRope, choose_rope_by_row
from trainer.data.types import PackedBatch
from trainer.model.adapter import attach_adapter
from trainer.model.attention import last_positions, register_packed_attention, segment_lengths
from trainer.model.held import HeldBase, causal_of
from trainer.model.invocation import Invocation, activate
from trainer.model.loss import row_losses, summed_cross_entropy, supervised_rows
from trainer.spec import SpecError, TrainSpec


class LossModel(nn.Module):
    """A causal model whose forward is its summed loss: the one module that is called, so that sharding can wrap it."""

    def __init__(self, net: PeftModel | PreTrainedModel, invocation: Invocation | None = None) -> None:
        """invocation: of the net's activated LoRA, if it is one."""
        super().__init__()
        self.net = net
        self.invocation = invocation
        self.rope: RowRope | None = choose_rope_by_row(self.causal)

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model, with the adapter's layers in it if there is an adapter."""
        return self.net.get_base_model() if isinstance(self.net, PeftModel) else self.net

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return list(self.causal.get_submodule(family_of(type(self.causal).__name__).layers).children())

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: tuple[int, ...],
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        pairs: Tensor | None = None,
    ) -> Tensor:
        """All [1, T]. Returns the sum of weight x nll over supervised tokens, with pairs of each pair's [P]; without
        labels the logits [T, V]."""
        causal: Any = self.causal
        if self.invocation is not None:
            self.invocation.mark(input_ids, segments)
        if self.rope is not None:
            self.rope.last_positions_1T = last_positions(segments, position_ids.device)
        hidden_TH = causal.base_model(
            input_ids=input_ids, position_ids=position_ids, segments=segments, use_cache=False
        ).last_hidden_state[0]
        if labels is None or weights is None:
            return self._head(hidden_TH)
        rows = supervised_rows(labels)
        if pairs is not None:
            terms_N = row_losses(hidden_TH[rows], self._head, labels[0, rows + 1]) * weights[0, rows + 1]
            return terms_N.new_zeros(int(pairs.max()) + 1).index_add(0, pairs[0, rows + 1], terms_N)
        learned = [parameter for parameter in causal.lm_head.parameters() if parameter.requires_grad]
        return summed_cross_entropy(hidden_TH[rows], self._head, labels[0, rows + 1], weights[0, rows + 1], learned)

    def _head(self, hidden: Tensor) -> Tensor:
        causal: Any = self.causal
        logits: Tensor = causal.lm_head(hidden)
        cap = getattr(causal.config, "final_logit_softcapping", None)
        logits = logits / getattr(causal.config, "logits_scaling", 1.0)  # Granite's
        return logits if cap is None else torch.tanh(logits / cap) * cap


@dataclass(frozen=True, eq=False)
class Trainee:
    """The model as the loop sees it."""

    module: LossModel
    device: torch.device
    compute_dtype: torch.dtype
    beta: float = 0.1  # of preference pairs
    start: tuple[Tensor, ...] = ()  # the trained weights of the adapter that the run continues from

    def loss(self, batch: PackedBatch) -> Tensor:
        """Sum of weight x nll over the batch's supervised tokens, in nats; of preference pairs the sum of their losses;
        float32 scalar."""
        labels, weights = batch.labels.to(self.device), batch.weights.to(self.device)
        if batch.pairs is not None:
            return nn.functional.softplus(-self.beta * self._margins(batch, labels, weights)).sum()
        return self._run(batch.input_ids, batch.position_ids, labels, weights)

    def _margins(self, batch: PackedBatch, *targets: Tensor) -> Tensor:
        """By how much more the adapter prefers each chosen answer than what it began as does, in nats [P].

        The loss over them, softplus(-beta x margin), is DPO's (Rafailov et al. 2023, arXiv 2305.18290, equation 7).
        """
        assert batch.pairs is not None, "a batch of preference pairs"
        inputs, pairs = (batch.input_ids, batch.position_ids, *targets), batch.pairs.to(self.device)
        with torch.no_grad(), self._reference():
            before_P = self._run(*inputs, pairs=pairs)
        return before_P - self._run(*inputs, pairs=pairs)

    @contextmanager
    def _reference(self) -> Iterator[None]:
        """The model that the run began with: the base alone, or the base with the adapter it continues from."""
        assert self.peft is not None, "pairs are learned by an adapter"
        if not self.start:
            with self.peft.disable_adapter():
                yield
            return
        trained = self.trained()
        now = [weight.data for weight in trained]
        for weight, before in zip(trained, self.start, strict=True):
            weight.data = before
        try:
            yield
        finally:
            for weight, own in zip(trained, now, strict=True):
                weight.data = own

    def logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[1, T] each -> logits [T, V]."""
        return self._run(input_ids, position_ids)

    def _run(self, input_ids: Tensor, position_ids: Tensor, *targets: Tensor, pairs: Tensor | None = None) -> Tensor:
        segments = segment_lengths(position_ids)
        with self.autocast():
            out: Tensor = self.module(
                input_ids.to(self.device), position_ids.to(self.device), segments, *targets, pairs=pairs
            )
        return out

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 products if the run uses them."""
        if self.compute_dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout and no gradients in the block. After it, shards are shards again: a forward without a backward
        would leave whole parameters in their place, which no optimizer knows."""
        self.module.eval()
        with torch.no_grad():
            yield
        self.module.train()
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """transformers' eager attention and its own choice of rotary factors, for one example a forward."""
        causal: Any = self.module.causal
        causal.set_attn_implementation("eager")
        rope, self.module.rope = self.module.rope, None
        if rope is not None:
            rope.last_positions_1T = None
        yield
        causal.set_attn_implementation(register_packed_attention())
        self.module.rope = rope

    @property
    def peft(self) -> PeftModel | None:
        return self.module.net if isinstance(self.module.net, PeftModel) else None

    def named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that learn, by name, in model order; a tied one once."""
        return ((name, weight) for name, weight in self.module.named_parameters() if weight.requires_grad)

    def trained(self) -> list[nn.Parameter]:
        return [weight for _, weight in self.named_trained()]


def load(spec: TrainSpec, device: torch.device, held: HeldBase | None = None) -> Trainee:
    """Base and adapter on one device. held: a base that need not be read again.

    Raises UnsupportedBase, SpecError (targets that the base does not have)."""
    dtype = DTYPES[spec.precision]
    refuse_stored_nf4(spec)
    causal = causal_of(
        spec.base,
        torch.float32 if spec.method == "full" else dtype,
        device,
        held if spec.method != "full" else None,
        nf4=spec.method == "qlora",
        attention=register_packed_attention(),
    )
    net = prepare(causal, spec, device)
    module = LossModel(net, activate(net, spec.adapter.invocation) if isinstance(net, PeftModel) else None)
    trainee = Trainee(module, device, dtype, beta=spec.dpo.beta)
    if spec.objective == "dpo" and spec.initial_adapter is not None:
        trainee = replace(trainee, start=tuple(weight.detach().clone() for weight in trainee.trained()))
    if spec.objective == "dpo" and any(weight.requires_grad for weight in trainee.module.causal.lm_head.parameters()):
        raise SpecError("adapter.target_modules", "lm_head", 'without lm_head with objective "dpo"')
    return trainee


def refuse_stored_nf4(spec: TrainSpec) -> None:
    """Raises SpecError if the base is stored in NF4, and method or sharding needs it plain; UnsupportedBase."""
    if not is_stored_in_nf4(load_config(spec.base)):
        return
    if spec.method != "qlora":
        raise SpecError("method", spec.method, "qlora for a base that is stored in NF4")
    if spec.sharding == "fsdp":
        raise SpecError("sharding", spec.sharding, "none for a base that is stored in NF4 (shards are quantised again)")


def prepare(causal: PreTrainedModel, spec: TrainSpec, device: torch.device) -> PeftModel | PreTrainedModel:
    """What every way of loading ends with: no dropout of the base's own, the adapter, checkpointing, train mode."""
    for module in causal.modules():
        if isinstance(module, nn.Dropout):  # GPT-2's was for its pretraining; adapter.dropout is the spec's
            module.p = 0.0
    causal.requires_grad_(spec.method == "full")
    net = causal if spec.method == "full" else attach_adapter(causal, spec, device)
    if spec.checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    net.train()
    return net
