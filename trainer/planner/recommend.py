"""What to train, with which settings, and why: from the task, the data, the devices and the number of variants.

Capacity decides the rank: a network stores about 2 bits a parameter (Allen-Zhu and Li 2024, arXiv 2404.05405) and a
token of text holds about 1 bit to learn, so an adapter below one parameter per two supervised tokens learns less than a
full fine-tune, and above it as much (Biderman et al. 2024, arXiv 2405.09673; Schulman et al. 2025, "LoRA Without
Regret").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.planner.gpus import Gpu
from trainer.planner.hardware import FILL, RUNTIME_BYTES
from trainer.planner.memory import GB, MemoryNeed, Method, Sharding, TrainingCase, memory_need
from trainer.planner.shapes import ModelShape, PlanError, require_at_least
from trainer.planner.timing import RunTime, run_time

RANKS = (8, 16, 32, 64, 128, 256)
BITS_PER_PARAMETER, BITS_PER_TOKEN = 2.0, 1.0
FEW_EXAMPLES = 50
TASKS = {  # smallest rank that is worth starting from, and why
    "style": (8, "tone and form are a small change of the base"),
    "format": (8, "an output format is a small change of the base"),
    "knowledge": (16, "facts need capacity: the data's size decides above rank 16"),
    "reasoning": (32, "code and mathematics gain from higher ranks (Biderman et al. 2024, section 4)"),
    "language": (64, "a new language or domain is continued pretraining, where low ranks fall behind"),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be trained. example_tokens: about half are supervised. variants: adapters of this base in all."""

    shape: ModelShape
    task: str
    examples: int
    example_tokens: int = 512
    epochs: int = 3
    variants: int = 1
    gpu: Gpu
    devices: int = 1

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise PlanError("task", f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        require_at_least(1, self, "examples", "example_tokens", "epochs", "variants", "devices")

    @property
    def supervised_tokens(self) -> int:
        return self.examples * self.example_tokens // 2

    @property
    def train_tokens(self) -> int:
        return self.examples * self.example_tokens * self.epochs


@dataclass(frozen=True)
class Recommendation:
    """case: what to run, with its need and time. spec: the same as fields of a training spec."""

    case: TrainingCase
    need: MemoryNeed
    time: RunTime
    spec: dict[str, Any]
    reasons: tuple[str, ...]
    assumptions: tuple[str, ...]


def recommend(question: Question) -> Recommendation:
    """Raises PlanError if not even QLoRA with recomputation fits the devices, with the figures."""
    rank, rank_reason, fits_capacity = _rank(question)
    wants_full = not fits_capacity and question.variants == 1
    reasons = [rank_reason, _adapters_or_full(question, rank, wants_full=wants_full)]
    case, why = _first_that_fits(question, rank, wants_full=wants_full)
    reasons += [why, *_further(question, case)]
    need = memory_need(case)
    time = run_time(case, question.gpu, train_tokens=question.train_tokens, sequence_length=question.example_tokens)
    assumptions = (
        "half of each example's tokens are supervised",
        f"{BITS_PER_TOKEN:g} bit to learn a supervised token",
        f"{BITS_PER_PARAMETER:g} bits stored a trained parameter",
        *need.assumptions,
        *time.assumptions,
    )
    return Recommendation(case, need, time, _spec(question, case), tuple(reasons), assumptions)


def _rank(question: Question) -> tuple[int, str, bool]:
    """The rank, why, and whether it holds what the data has to teach."""
    floor, why = TASKS[question.task]
    wanted = question.supervised_tokens * BITS_PER_TOKEN / BITS_PER_PARAMETER
    for rank in RANKS:
        held = question.shape.adapter_parameters(rank)
        if rank >= floor and held >= wanted:
            data = f"{question.supervised_tokens:,} supervised tokens want {wanted:,.0f} trained parameters"
            return rank, f"rank {rank}: {why}; {data}, rank {rank} on all linear layers has {held:,}", True
    held = question.shape.adapter_parameters(RANKS[-1])
    reason = f"rank {RANKS[-1]}: the data wants {wanted:,.0f} trained parameters, the highest rank served has {held:,}"
    return RANKS[-1], reason, False


def _adapters_or_full(question: Question, rank: int, *, wants_full: bool) -> str:
    base, each = question.shape.weight_bytes("bfloat16"), 2 * question.shape.adapter_parameters(rank)
    if wants_full:
        return "full: one variant, and more data than any adapter that is served can hold"
    if question.variants > 1:
        whole = f"{question.variants} full copies would be {question.variants * base / GB:,.0f} GB"
        share = f"{question.variants} of them share one base, {question.variants * each / GB:,.2f} GB beside it"
        return f"adapters: {share}; {whole}"
    return f"an adapter: the data fits it, and it is {each / 1e6:,.0f} MB, while a full copy is {base / GB:,.1f} GB"


def _first_that_fits(question: Question, rank: int, *, wants_full: bool) -> tuple[TrainingCase, str]:
    usable = FILL * question.gpu.memory_bytes
    refused: list[str] = []
    for case in _ways(question, rank, wants_full=wants_full):
        total = memory_need(case).total
        way = f"{case.method}{' with checkpointing' if case.checkpointing else ''}"
        if total <= usable:
            others = "".join(f"; {each}" for each in refused)
            return case, f"{way}: {total / GB:.1f} GB fit {question.gpu.name}'s {usable / GB:.1f} usable GB{others}"
        refused.append(f"{way} would take {total / GB:.1f} GB")
    message = (
        f"nothing fits {question.devices} x {question.gpu.name} of {usable / GB:.1f} usable GB: {', '.join(refused)}"
    )
    raise PlanError("gpu", f"{message}; take more or larger devices, or a smaller base")


def _ways(question: Question, rank: int, *, wants_full: bool) -> Iterator[TrainingCase]:
    """From the one that learns best and runs fastest to the smallest."""
    methods: tuple[Method, ...] = ("full", "lora", "qlora") if wants_full else ("lora", "qlora")
    for method in methods:
        for checkpointing in (False, True):
            yield TrainingCase(
                shape=question.shape,
                method=method,
                rank=rank,
                tokens=max(2048, question.example_tokens),
                checkpointing=checkpointing,
                sharding=Sharding(3, question.devices) if question.devices > 1 else Sharding(),
                runtime_bytes=RUNTIME_BYTES,
            )


def _further(question: Question, case: TrainingCase) -> Iterator[str]:
    if case.method == "qlora":
        yield "qlora: the frozen base in 4 bits costs about a third of the speed, and little quality (arXiv 2305.14314)"
    if case.method != "full":
        yield "alpha 2r: the scale is 2 at every rank, so rsLoRA (arXiv 2312.03732) has nothing left to correct"
        yield "learning rate 2e-4: about ten times that of a full fine-tune, whatever the rank (LoRA Without Regret)"
        yield "not dora: it learns little more than lora of the same rank, and trains at two thirds of its speed"
    if question.examples < FEW_EXAMPLES:
        yield f"only {question.examples} examples: put them into the prompt first; training pays from {FEW_EXAMPLES}"
    if question.devices > 1:
        yield f"fsdp: {question.devices} devices share out weights, gradients and states"


def _spec(question: Question, case: TrainingCase) -> dict[str, Any]:
    length = max(2048, question.example_tokens)
    spec: dict[str, Any] = {
        "method": case.method,
        "precision": case.precision,
        "checkpointing": case.checkpointing,
        "sharding": "fsdp" if question.devices > 1 else "none",
        "optim": {"learning_rate": 2e-5 if case.method == "full" else 2e-4, "epochs": question.epochs},
        "batch": {"examples": min(32, max(4, question.examples // 20)), "max_sequence_length": length},
    }
    if case.method != "full":
        spec["adapter"] = {"rank": case.rank}
    return spec
