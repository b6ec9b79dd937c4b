"""Proves at the start of a run that packing changes nothing: packed logits against each example's own.

bfloat16 rounds after every operation, and how far that moves the logits depends on the base: a fixed limit stops sound
bases by chance. So the difference is compared with the base's own noise: the same examples, alone, with some values of
every layer's input moved by one unit in the last place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapters_store.base.families import UnsupportedBase
from adapters_store.errors import UserError
from trainer.data.examples import lengths_of
from trainer.data.packing import pack
from trainer.data.types import EncodedExample
from trainer.model.attention import last_positions, segment_lengths
from trainer.model.model import Trainee

NUM_EXAMPLES = 3
NUM_TOKENS = 48  # of each: enough for every kind of layer, cheap enough for every start
MOST_NOISES = 4.0  # a sound base differs by 0.2 to 1.5 of its noise, examples that see each other by 20 and more
LEAST_NOISE = {torch.float32: 2.5e-5, torch.bfloat16: 2e-3}  # of a base that hardly rounds


class PackingBroken(UserError):
    """The base computes something else for packed examples than for each alone; training on it would be wrong."""

    def __init__(self, message: str) -> None:
        super().__init__("packing_broken", f"{message}; batch.packing: false trains each example alone", param="base")


def check_packing(trainee: Trainee, examples: Sequence[EncodedExample], proven: float | None = None) -> float:
    """Difference of logits, relative to their spread, of the example that differs most. Raises PackingBroken above
    MOST_NOISES of the base's own noise, UnsupportedBase if the untrained model's logits are not finite.

    proven: what this gave for other examples on this base: then only what depends on the examples is checked.
    The packed forward runs through our attention; alone, each example runs through transformers' own eager attention.
    """
    _check_rope(trainee, examples)
    if proven is not None:
        return proven
    chosen = [_shortened(example) for example in examples[:NUM_EXAMPLES]]
    packed = pack(chosen)
    with trainee.evaluating():
        together = trainee.logits(packed.input_ids, packed.position_ids).float().split(list(map(len, chosen)))
        with trainee.own_attention():
            alone = [_alone(trainee, example) for example in chosen]
            with _rounded_otherwise(trainee):
                moved = [_alone(trainee, example) for example in chosen]
    if not all(bool(torch.isfinite(logits).all()) for logits in alone):
        raise UnsupportedBase("the base's logits are not finite before training: its weights hold NaN, or overflow")
    noise = max(*map(_distance, moved, alone), LEAST_NOISE[trainee.compute_dtype])
    difference = max(map(_distance, together, alone))
    if not difference <= MOST_NOISES * noise:
        raise PackingBroken(
            f"packed logits differ from unpacked ones by {difference:.2g} of their spread, "
            f"{difference / noise:.3g} times the base's own rounding; limit {MOST_NOISES:g}"
        )
    return difference


def _distance(one_TV: Tensor, other_TV: Tensor) -> float:
    """Root mean square of the difference over that of `other` around each row's mean."""
    spread = (other_TV - other_TV.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    return float((one_TV - other_TV).square().mean().sqrt() / spread.clamp(min=1e-6))


@contextmanager
def _rounded_otherwise(trainee: Trainee) -> Iterator[None]:
    """One of 16 values of each layer's input is moved by a unit in the last place: as far as rounding moves all."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.finfo(trainee.compute_dtype).eps

    def move(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden: Tensor = inputs[0]
        drawn = torch.randint(0, 32, hidden.shape, generator=generator).to(hidden.device)
        steps = (drawn == 0).to(hidden.dtype) - (drawn == 1).to(hidden.dtype)
        return (hidden * (1 + unit * steps), *inputs[1:])

    hooks = [layer.register_forward_pre_hook(move) for layer in trainee.module.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_rope(trainee: Trainee, examples: Sequence[EncodedExample]) -> None:
    """LongRoPE's factors depend on an example's whole length: packed, each must be rotated as it is alone."""
    rope = trainee.module.rope
    if rope is None:
        return
    lengths = lengths_of(examples)
    packed = pack([*examples[:NUM_EXAMPLES], examples[int(np.argmax(lengths))]])
    segments = segment_lengths(packed.position_ids)
    positions, probe = packed.position_ids.to(trainee.device), torch.zeros(1, device=trainee.device)
    rope.last_positions_1T = last_positions(segments, trainee.device)
    together = torch.cat(rope(probe, positions))
    alone = [torch.cat(rope.own(probe, part)) for part in positions.split(list(segments), dim=1)]
    if not torch.equal(together, torch.cat(alone, dim=1)):
        raise PackingBroken("packed examples are not rotated by the factors for each one's own length")


def _alone(trainee: Trainee, example: EncodedExample) -> Tensor:
    batch = pack([example])
    return trainee.logits(batch.input_ids, batch.position_ids).float()


def _shortened(example: EncodedExample) -> EncodedExample:
    text = example.text(chosen=True)
    return EncodedExample(text.input_ids[:NUM_TOKENS], text.weights[:NUM_TOKENS])
