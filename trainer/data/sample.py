"""Shows an example as text, with its learned parts marked. Knows tokens and one tokenizer; no files."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.types import EncodedExample


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of one weight, as text. weight 0: context, not learned."""

    text: str
    weight: float
    num_tokens: int


def runs_of(example: EncodedExample, tokenizer: Any) -> list[Run]:
    """The example in pieces of equal weight, special tokens spelled out."""
    borders = [0, *(np.flatnonzero(np.diff(example.weights)) + 1).tolist(), len(example)]
    return [
        Run(
            tokenizer.decode(example.input_ids[start:stop].tolist(), skip_special_tokens=False),
            float(example.weights[start]),
            stop - start,
        )
        for start, stop in itertools.pairwise(borders)
    ]


def as_html(runs: Sequence[Run]) -> str:
    """Escaped; learned parts in <mark>, with their weight in a title if it is not 1."""
    parts = []
    for run in runs:
        title = "" if run.weight == 1 else f' title="weight {run.weight:g}"'
        text = html.escape(run.text)
        parts.append(f"<mark{title}>{text}</mark>" if run.weight else f"<span>{text}</span>")
    return "".join(parts)


def pick(examples: Sequence[EncodedExample], count: int) -> list[EncodedExample]:
    """`count` examples spread over the file, the first among them."""
    count = min(count, len(examples))
    return [examples[index * len(examples) // count] for index in range(count)]
