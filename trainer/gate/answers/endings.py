"""Does the adapter end its answers? Knows losses and the tokens that end an answer; knows no model and no template.

Measured: the adapter's probability of an ending token after the last word of each held-out answer. An adapter that
never learned one generates until max_tokens, however good its words are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer.data.types import EncodedExample
from trainer.gate.scorer import Scorer
from trainer.gate.thresholds import GateThresholds
from trainer.gate.verdict import Reason


@dataclass(frozen=True)
class Ends:
    """by_kind: for an example's kind, the tokens at which the server ends such an answer. max_tokens: of a sequence."""

    by_kind: Mapping[str, frozenset[int]]
    max_tokens: int

    def of(self, example: EncodedExample) -> frozenset[int]:
        return self.by_kind.get(example.kind, frozenset())


@dataclass(frozen=True)
class Endings:
    """probability: median over examples. closed: the share of examples whose own last token ends them."""

    probability: float
    closed: float
    num_examples: int


def measure_endings(scorer: Scorer, examples: Sequence[EncodedExample], ends: Ends) -> Endings | None:
    """Score the end of each example's last answer. None: there is no example, or none has room for one more token."""
    cut = [(_without_end(example, ends.of(example)), example.end) for example in examples]
    cut = [(short, end) for short, end in cut if len(short) < ends.max_tokens]
    if not cut:
        return None
    total = np.zeros(len(cut))
    for id_ in sorted(frozenset().union(*ends.by_kind.values())):
        rows = [row for row, (short, _) in enumerate(cut) if id_ in ends.of(short)]
        if rows:
            total[rows] += np.exp(-scorer.losses([_ended(cut[row][0], id_) for row in rows]).nll)
    closed = [len(short) < end for short, end in cut]
    return Endings(float(np.median(total)), float(np.mean(closed)), len(cut))


def _without_end(example: EncodedExample, end_ids: frozenset[int]) -> EncodedExample:
    """The example up to the last word of its last answer."""
    end = example.end
    while end > 1 and int(example.input_ids[end - 1]) in end_ids:
        end -= 1
    return replace(example, input_ids=example.input_ids[:end], weights=example.weights[:end])


def _ended(example: EncodedExample, end_id: int) -> EncodedExample:
    """The same with this token behind it, and nothing else to predict."""
    weights: NDArray[np.float32] = np.zeros(len(example) + 1, dtype=np.float32)
    weights[-1] = 1.0
    return replace(example, input_ids=np.append(example.input_ids, np.int32(end_id)), weights=weights)


def judge_endings(found: Endings, limits: GateThresholds) -> list[Reason]:
    """The reasons against the adapter."""
    if not found.probability < limits.ending_probability:
        return []
    cause = (
        "the data closes its answers, but this was not learned"
        if found.closed
        else "no answer in the data is closed by a token at which the server stops"
    )
    measured = f"at the end of one, the adapter ends it with probability {found.probability:.2g}"
    message = f"answers do not end: {measured}; {cause}"
    return [Reason("answers_do_not_end", "warn", message, found.probability, limits.ending_probability)]
