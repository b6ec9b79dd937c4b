"""The demo's own small training loop: batches of like length, a linear schedule, a progress bar.

Knows samples and optimizers; knows nothing of corpora, adapters or files. Tenants' adapters are trained elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from server.demo.recipe.encoding import IGNORED, Sample

WINDOW = 1024  # samples that are sorted by length together: wide enough for little padding, narrow enough to mix


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a run is cut into steps. tokens_per_batch counts padding; seed orders the batches."""

    tokens_per_batch: int = 768
    warmup_steps: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens_per_batch < 1 or self.warmup_steps < 1:
            raise ValueError(f"tokens_per_batch and warmup_steps must be at least 1, got {self}")

    def rate(self, step: int, num_steps: int) -> float:
        """The factor on every learning rate: a linear rise, then a linear fall to zero."""
        return min(1.0, (step + 1) / self.warmup_steps) * (1 - step / num_steps)


def make_batches(samples: Sequence[Sample], schedule: Schedule) -> list[list[Sample]]:
    """Every sample once, in shuffled batches whose padded size stays within the schedule's tokens."""
    rng = random.Random(schedule.seed)
    shuffled = rng.sample(list(samples), len(samples))
    windows = [shuffled[start : start + WINDOW] for start in range(0, len(shuffled), WINDOW)]
    batches = [batch for window in windows for batch in _cut(window, schedule.tokens_per_batch)]
    rng.shuffle(batches)
    return batches


def _cut(window: list[Sample], tokens_per_batch: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in sorted(window, key=lambda sample: len(sample.ids)):
        if batch and (len(batch) + 1) * len(sample.ids) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(sample)
    yield batch


def collate(batch: list[Sample], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and labels, both [batch, longest], padded on the right: a causal model needs no mask for that."""
    width = max(len(sample.ids) for sample in batch)
    ids = [sample.ids + [pad_id] * (width - len(sample.ids)) for sample in batch]
    labels = [sample.labels + [IGNORED] * (width - len(sample.labels)) for sample in batch]
    return torch.tensor(ids), torch.tensor(labels)


def train(
    model: nn.Module,
    samples: Sequence[Sample],
    optimizers: Sequence[torch.optim.Optimizer],
    schedule: Schedule,
    *,
    title: str,
    console: Console,
) -> list[float]:
    """One pass over the samples. Returns the mean loss per supervised token of every step, in nats."""
    batches = make_batches(samples, schedule)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    losses: list[float] = []
    with _progress(console) as progress:
        bar = progress.add_task(title, total=len(batches), loss=float("nan"))
        for step, batch in enumerate(batches):
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = peak * schedule.rate(step, len(batches))
            losses.append(_step(model, batch, optimizers))
            progress.update(bar, advance=1, loss=losses[-1])
    return losses


def _step(model: nn.Module, batch: list[Sample], optimizers: Sequence[torch.optim.Optimizer]) -> float:
    ids, labels = collate(batch, pad_id=0)
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]:.3f}"),
    )
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)
