"""Proves at the start of a run that packing changes nothing: packed logits against each example's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from adapters_store.base.families import UnsupportedBase
from trainer.data.examples import lengths_of
from trainer.data.packing import pack
from trainer.data.types import EncodedExample
from trainer.model.attention import last_positions, segment_lengths
from trainer.model.model import Trainee

NUM_EXAMPLES = 3
NUM_TOKENS = 48  # of each: enough for every kind of layer, cheap enough for every start
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest logit


class PackingBroken(RuntimeError):
    """The base computes something else for packed examples than for each alone; training on it would be wrong."""


def check_packing(trainee: Trainee, examples: Sequence[EncodedExample]) -> float:
    """Largest difference of logits, relative to the largest logit. Raises PackingBroken above the tolerance,
    UnsupportedBase if the untrained model's logits are not finite.

    The packed forward runs through our attention; alone, each example runs through transformers' own eager attention.
    """
    chosen = [_shortened(example) for example in examples[:NUM_EXAMPLES]]
    _check_rope(trainee, examples)
    packed = pack(chosen)
    with trainee.evaluating():
        together = trainee.logits(packed.input_ids, packed.position_ids).float()
        with trainee.own_attention():
            alone = torch.cat([_alone(trainee, example) for example in chosen]).float()
    if not bool(torch.isfinite(alone).all()):
        raise UnsupportedBase("the base's logits are not finite before training: its weights hold NaN, or overflow")
    difference = float((together - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
    limit = TOLERANCE[trainee.compute_dtype]
    if not difference <= limit:
        raise PackingBroken(
            f"packed logits differ from unpacked ones by {difference:.2g} of the largest; limit {limit:g}"
        )
    return difference


def _check_rope(trainee: Trainee, examples: Sequence[EncodedExample]) -> None:
    """LongRoPE turns on whole lengths: the longest example's rotation beside others', against each one's alone."""
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


def _alone(trainee: Trainee, example: EncodedExample) -> torch.Tensor:
    batch = pack([example])
    return trainee.logits(batch.input_ids, batch.position_ids)


def _shortened(example: EncodedExample) -> EncodedExample:
    return EncodedExample(example.input_ids[:NUM_TOKENS], example.weights[:NUM_TOKENS])
