"""Decides which examples are held out or mixed in, by content and seed, never by the order of a file. Knows no text."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from trainer.data.examples import DIGEST_BYTES, Examples
from trainer.data.problems import DataRejected, Problem

VALIDATION_FRACTION = 0.05
MIN_VALIDATION = 8  # fewer are too few to judge by; but never more than a quarter of the data
ENOUGH_VALIDATION = 32  # so many tell good from bad; but never more than a fifth of the data
MIN_DISTINCT = 8


@dataclass(frozen=True)
class Split:
    """train and validation share no example, not even a copy of one. Both keep the file's order."""

    train: Examples
    validation: Examples


def split(
    examples: Examples,
    *,
    seed: int = 0,
    enough: int = MIN_VALIDATION,
    what: str = "data",
) -> Split:
    """Hold out VALIDATION_FRACTION of the distinct examples, by digest; at least MIN_VALIDATION but at most a quarter,
    and at least `enough` but at most a fifth.

    A record and its copies, and every answer of an unrolled chat, fall on the same side. Raises
    DataRejected(too_few_examples) under MIN_DISTINCT distinct ones.
    """
    digests = examples.digests
    distinct = np.unique(digests)
    if len(distinct) < MIN_DISTINCT:
        message = f"{len(distinct)} distinct examples, at least {MIN_DISTINCT} are needed to hold some out"
        raise DataRejected([Problem(0, "too_few_examples", message)], what=what)
    least = max(min(MIN_VALIDATION, len(distinct) // 4), min(enough, len(distinct) // 5))
    wanted = max(math.ceil(len(distinct) * VALIDATION_FRACTION), least)
    ranks = np.array([_rank(digest, seed) for digest in distinct.tolist()])
    is_held_out = np.isin(digests, distinct[np.argsort(ranks)[:wanted]])
    return Split(train=examples.where(~is_held_out), validation=examples.where(is_held_out))


def _rank(digest: bytes, seed: int) -> bytes:
    whole = digest.ljust(DIGEST_BYTES, b"\0")
    return hashlib.blake2b(whole, key=seed.to_bytes(8, "little"), digest_size=16).digest()


def apart(train: Examples, validation: Examples) -> Split:
    """The two as they are, less the training examples that a validation file repeats.

    Raises DataRejected(too_few_examples) if nothing would be left to train on.
    """
    kept = without(train, validation)
    if not kept:
        message = "every training example is in the validation file too"
        raise DataRejected([Problem(0, "too_few_examples", message)], what="validation")
    return Split(kept, validation)


def without(examples: Examples, others: Examples) -> Examples:
    """The examples that `others` do not repeat."""
    return examples.where(~np.isin(examples.digests, others.digests))


def mixed(train: Examples, general: Examples, *, fraction: float, seed: int = 0) -> Examples:
    """Training examples and as many general ones as make `fraction` of the whole (all there are, if fewer)."""
    wanted = min(len(general), round(len(train) * fraction / (1 - fraction)))
    chosen = np.random.default_rng([seed, 1]).permutation(len(general))[:wanted]
    return train + general.where(np.isin(np.arange(len(general)), chosen))
