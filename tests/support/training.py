"""Examples, batches and specs for the trainer's tests, on the tiny bases of `support.models`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.models import VOCAB
from trainer.data.packing import pack
from trainer.data.types import EncodedExample, PackedBatch
from trainer.spec import TrainSpec


def random_examples(count: int, *, seed: int = 0, low: int = 4, high: int = 24) -> list[EncodedExample]:
    """Random tokens; roughly the second half of each is learned."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        length = int(rng.integers(low, high))
        weights = (np.arange(length) >= max(length // 2, 1)).astype(np.float32)
        examples.append(EncodedExample(rng.integers(3, VOCAB, length).astype(np.int32), weights, bytes([index % 256])))
    return examples


def random_batch(count: int, *, seed: int = 0) -> PackedBatch:
    return pack(random_examples(count, seed=seed))


def tiny_spec(base: Path, **changes: Any) -> TrainSpec:
    """A LoRA run on `base`; nested changes as in YAML."""
    body: dict[str, Any] = {"base": base, "data": "unused.jsonl", "adapter": {"rank": 4}}
    return TrainSpec.from_mapping({**body, **changes})


def gradients(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """All gradients in one vector."""
    return torch.cat([parameter.grad.flatten().float() for parameter in parameters if parameter.grad is not None])
