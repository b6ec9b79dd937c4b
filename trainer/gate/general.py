"""What the adapter costs on general text: the rise of its loss over the base's. Knows losses and a text; no model.

The text is the held-out part of the run's mix file, or, without a mix file, a small text of our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from trainer.data.encode import Encoder, encode_all
from trainer.data.records import Record
from trainer.data.types import EncodedExample
from trainer.gate.bootstrap import Interval
from trainer.gate.general_text import PASSAGES
from trainer.gate.held_out import gain_of
from trainer.gate.scorer import BASE_ALONE, Losses, Scorer
from trainer.gate.thresholds import GateThresholds
from trainer.gate.verdict import Reason

OWN_TEXT, MIX = "own text", "mix"
_LONGEST_PASSAGE = 4096  # tokens: more than one for every byte


@dataclass(frozen=True)
class GeneralText:
    """rise: adapter less base in nats per token, so above zero is bad. source: OWN_TEXT or MIX.

    guess_loss: of a guess that takes every token for equally likely. A base that does no better does not know the
    text's language: it has nothing to forget there, so the rise is not judged.
    """

    source: str
    guess_loss: float
    base_loss: float
    adapter_loss: float
    rise: Interval

    @property
    def base_knows_it(self) -> bool:
        return self.base_loss < self.guess_loss

    def to_mapping(self) -> dict[str, object]:
        return {**asdict(self), "base_knows_it": self.base_knows_it}


def own_examples(tokenizer: Any, *, max_tokens: int, num_embeddings: int | None = None) -> list[EncodedExample]:
    """The project's own passages as plain text, each cut after max_tokens (2 or more), as only a tiny base needs.

    Raises DataRejected if the base has no embedding row for one of their tokens (see `Encoder`).
    """
    encoder = Encoder(tokenizer, max_sequence_length=_LONGEST_PASSAGE, num_embeddings=num_embeddings)
    records = [(line, b"", Record("text", completion=passage)) for line, passage in enumerate(PASSAGES, 1)]
    whole = encode_all(records, encoder, what="general text")
    return [replace(item, input_ids=item.input_ids[:max_tokens], weights=item.weights[:max_tokens]) for item in whole]


def measure_general(
    scorer: Scorer,
    examples: Sequence[EncodedExample],
    source: str,
    limits: GateThresholds,
    *,
    base: Losses | None = None,
) -> GeneralText:
    """Score the text with and without the adapter. base: the base's losses, if they are known."""
    base, adapter = base or scorer.losses(examples, scale=BASE_ALONE), scorer.losses(examples)
    rise = gain_of(adapter, base, limits)
    return GeneralText(source, math.log(scorer.vocab_size), base.mean, adapter.mean, rise)


def judge_general(found: GeneralText, limits: GateThresholds, *, gain: float = 0.0) -> list[Reason]:
    """The reasons against the adapter. gain: on its own data, in nats per learned token. An adapter for a narrow task
    may forget a small part of it."""
    rise, most = found.rise.estimate, max(limits.general_block, limits.general_share * gain)
    if not np.isfinite(rise):
        return [Reason("general_not_finite", "block", "the loss on general text is not a finite number")]
    if not found.base_knows_it:
        return []
    message = f"the loss on general text ({found.source}) rises by {rise:.2f} nats, from {found.base_loss:.2f}"
    if rise > most:
        return [Reason("forgets", "block", message, rise, most)]
    if rise > limits.general_warn:
        return [Reason("forgets", "warn", message, rise, limits.general_warn)]
    return []
