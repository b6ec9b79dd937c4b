"""The memory of a training run on each device: weights, gradients, optimizer, activations, logits. Knows no hardware.

Counts as ZeRO does (Rajbhandari et al. 2020, arXiv 1910.02054, section 3): every trained parameter has a weight, a
gradient and an optimizer state; stage 1 shares out the states, stage 2 the gradients too, stage 3 (FSDP) weights too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from trainer.planner.activations import Kept, kept_by_forward
from trainer.planner.shapes import ModelShape, PlanError, require_at_least

Method = Literal["lora", "qlora", "dora", "full"]
GB = 10**9
GIB = 1 << 30
CHUNK_LOGITS = 1 << 22  # rows x vocabulary that the trainer's chunked loss holds at once


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """Bytes per trained parameter. weight: as it is used in the forward; master: a second, float32 copy."""

    name: str
    weight: int
    gradient: int
    master: int
    moments: int

    @property
    def total(self) -> int:
        return self.weight + self.gradient + self.master + self.moments

    def __str__(self) -> str:
        copy = f" + master copy {self.master}" if self.master else ""
        parts = f"weight {self.weight} + gradient {self.gradient}{copy} + AdamW moments {self.moments}"
        return f"{self.name}: {parts} = {self.total} bytes per trained parameter"


OPTIMIZER_STATES: Mapping[str, OptimizerState] = {
    state.name: state
    for state in (
        OptimizerState("trainer", 4, 4, 0, 8),  # ours: trained weights float32, matrix products in the run's precision
        OptimizerState("zero", 2, 2, 4, 8),  # with a master copy (Micikevicius et al. 2018, arXiv 1710.03740)
        OptimizerState("bf16-fp32-grads", 2, 4, 0, 8),
        OptimizerState("bf16", 2, 2, 0, 8),  # bfloat16 weights and gradients, float32 moments
        OptimizerState("bf16-moments", 2, 2, 0, 4),
        OptimizerState("8bit-moments", 2, 2, 0, 2),  # Dettmers et al. 2022, arXiv 2110.02861
        OptimizerState("trainer-8bit", 4, 4, 0, 2),  # ours with optim.moments 8bit
    )
}


@dataclass(frozen=True, slots=True)
class Sharding:
    """ZeRO stage 0 to 3 over `devices`; stage 3 is FSDP with resharding, stage 2 FSDP without."""

    stage: int = 0
    devices: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.stage <= 3:
            raise PlanError("stage", f"stage must be 0 to 3, got {self.stage}")
        require_at_least(1, self, "devices")

    def share(self, count: int, *, from_stage: int) -> int:
        """What one device holds of `count` bytes."""
        return -(-count // self.devices) if self.stage >= from_stage else count


@dataclass(frozen=True, kw_only=True)
class TrainingCase:
    """One way to train one base. tokens: in one forward of one device (sequence length x micro batch, or packed).

    logits_rows: rows of logits that the loss holds at once; None: as our trainer does.
    accumulates: several forwards make a step, so gradients exist beside activations.
    runtime_bytes: what the device's runtime takes (CUDA context, allocator); 0 on a CPU.
    """

    shape: ModelShape
    method: Method = "lora"
    precision: str = "bfloat16"
    tokens: int = 2048
    accumulates: bool = True
    checkpointing: bool = False
    rank: int = 16
    targets: tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    optimizer_state: OptimizerState = OPTIMIZER_STATES["trainer"]
    sharding: Sharding = Sharding()
    logits_rows: int | None = None
    runtime_bytes: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, self, "tokens", "rank", "logits_rows")
        require_at_least(0, self, "runtime_bytes")

    @property
    def loss_rows(self) -> int:
        """Rows of logits alive at once."""
        return min(self.tokens, self.logits_rows or max(CHUNK_LOGITS // self.shape.vocab, 1))

    @property
    def target_names(self) -> tuple[str, ...]:
        """Last names, each once."""
        chosen = self.shape.linears if self.targets is None else self.targets
        return tuple(dict.fromkeys(name.rpartition(".")[2] for name in chosen))

    @property
    def trained_parameters(self) -> int:
        """Everything (full), or A and B, with DoRA a magnitude per output (Liu et al. 2024, arXiv 2402.09353)."""
        if self.method == "full":
            return self.shape.parameters
        adapter = self.shape.adapter_parameters(self.rank, self.target_names, self.rank_pattern)
        if self.method == "dora":
            adapter += self.shape.layers * sum(self.shape.linears[name][1] for name in self.target_names)
        return adapter

    @property
    def frozen_bytes(self) -> int:
        if self.method == "full":
            return 0
        return self.shape.weight_bytes(self.precision, nf4=self.method == "qlora")


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One part of the sum, in bytes on one device, and how it was counted."""

    name: str
    num_bytes: int
    how: str


@dataclass(frozen=True)
class MemoryNeed:
    """One device's memory. lines add up to `total`, except parts that never exist at once (see the assumptions)."""

    case: TrainingCase
    lines: tuple[MemoryLine, ...]
    total: int
    assumptions: tuple[str, ...]

    def bytes_of(self, *names: str) -> int:
        """The sum of these lines."""
        return sum(line.num_bytes for line in self.lines if line.name in names)

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and optimizer: what the known rules of thumb count."""
        return self.bytes_of("frozen weights", "trained weights", "gradients", "optimizer")


def memory_need(case: TrainingCase) -> MemoryNeed:
    """The need of one device. Raises PlanError for targets that the base does not have."""
    kept = _kept(case)
    lines = (*_state_lines(case), *_forward_lines(case, kept))
    held = {line.name: line.num_bytes for line in lines}
    forward = held["activations"] + held["loss"]
    never_at_once = min(kept.layer_bytes, kept.loss_bytes) if case.checkpointing else 0
    backward = held["gradients"] + (0 if case.checkpointing else kept.layer_bytes)
    together = forward + held["gradients"] if case.accumulates else max(forward, backward)
    always = sum(held.values()) - forward - held["gradients"]
    return MemoryNeed(case, lines, always + together - never_at_once, _assumptions(case))


def _kept(case: TrainingCase) -> Kept:
    return kept_by_forward(
        case.shape,
        case.tokens,
        precision=case.precision,
        trains_base=case.method == "full",
        targets=() if case.method == "full" else case.target_names,
        rank=case.rank,
        chunk=case.loss_rows,
    )


def _state_lines(case: TrainingCase) -> list[MemoryLine]:
    share, count, state = case.sharding.share, case.trained_parameters, case.optimizer_state
    how_frozen = f"{case.shape.parameters - (count if case.method == 'full' else 0):,} parameters"
    kind = "NF4 linear layers, the rest " if case.method == "qlora" else ""
    return [
        MemoryLine("frozen weights", share(case.frozen_bytes, from_stage=3), f"{how_frozen}, {kind}{case.precision}"),
        MemoryLine("trained weights", share(count * state.weight, from_stage=3), f"{count:,} x {state.weight}"),
        MemoryLine("gradients", share(count * state.gradient, from_stage=2), f"{count:,} x {state.gradient}"),
        MemoryLine(
            "optimizer",
            share(count * (state.master + state.moments), from_stage=1),
            f"{count:,} x {state.master + state.moments}",
        ),
    ]


def _forward_lines(case: TrainingCase, kept: Kept) -> list[MemoryLine]:
    layers = case.shape.layers
    activations = kept.total(layers, checkpointing=case.checkpointing) - kept.loss_bytes
    how = "inputs of all layers and one layer whole" if case.checkpointing else "all layers whole"
    lines = [
        MemoryLine("activations", activations, f"{case.tokens:,} tokens, {how}"),
        MemoryLine("loss", kept.loss_bytes, f"{case.loss_rows:,} rows of {case.shape.vocab:,} logits"),
    ]
    if case.precision != "float32" and case.optimizer_state.weight == 4 and case.sharding.stage < 3:
        cast = 2 * (case.shape.multiplied_parameters if case.method == "full" else case.trained_parameters)
        lines.append(MemoryLine("cast weights", cast, "bfloat16 copies that products of float32 weights leave behind"))
    if case.sharding.stage == 3:
        weight = 2 if case.precision != "float32" else 4
        gathered = 2 * weight * case.shape.linear_parameters // layers
        lines.append(MemoryLine("gathered layers", gathered, "the layer at work and the one fetched ahead"))
    if case.runtime_bytes:
        lines.append(MemoryLine("runtime", case.runtime_bytes, "assumed"))
    return lines


def _assumptions(case: TrainingCase) -> tuple[str, ...]:
    assumptions = [*case.shape.assumptions, str(case.optimizer_state), "attention keeps no T x T scores (SDPA)"]
    if case.sharding.devices > 1:
        assumptions.append(f"ZeRO stage {case.sharding.stage} on {case.sharding.devices} devices, evenly shared")
    if case.checkpointing:
        assumptions.append("the loss is over when layers are computed again, so the larger of the two counts")
    if not case.accumulates:
        assumptions.append("one forward a step: gradients grow while activations are freed, so the larger counts")
    if case.runtime_bytes:
        assumptions.append(f"{case.runtime_bytes / GIB:.1f} GiB for CUDA's context, workspaces and allocator gaps")
    return tuple(assumptions)
