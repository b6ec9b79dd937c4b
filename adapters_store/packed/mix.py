"""The identity of several adapters as one: their deltas, each times its weight, added. Knows no bytes.

A mix has a digest of its own, so that everything keyed by digests (device pool, host tier, prefix cache, in-flight
references) treats it as one more adapter. The digest spells its parts, so no table is needed to load it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import NotCombinable

MAX_PARTS = 4
MAX_WEIGHT = 100.0
MAX_MIX_RANK = 256  # of all parts together: what one adapter may have

_PREFIX = "mix:"


class Part(NamedTuple):
    """One adapter of a mix. weight: finite, from -MAX_WEIGHT to MAX_WEIGHT."""

    digest: AdapterDigest
    weight: float


def mix_of(parts: Iterable[Part]) -> AdapterDigest:
    """The digest of a mix; the order of its parts is no part of it."""
    return AdapterDigest(_PREFIX + ",".join(sorted(f"{part.digest}*{part.weight.hex()}" for part in parts)))


def is_mix(digest: AdapterDigest) -> bool:
    return digest.startswith(_PREFIX)


def has_part(mix: AdapterDigest, digest: AdapterDigest) -> bool:
    """Whether this adapter is one of the mix's parts. A mix without its text is not parsed: there may be thousands."""
    return digest in mix and is_mix(mix) and digest in needs(mix)


def parts_of(digest: AdapterDigest) -> tuple[Part, ...]:
    """The parts of a mix, in the order in which they are added; none if it is one adapter."""
    if not is_mix(digest):
        return ()
    pairs = (text.rsplit("*", 1) for text in digest.removeprefix(_PREFIX).split(","))
    return tuple(Part(AdapterDigest(part), float.fromhex(weight)) for part, weight in pairs)


def needs(digest: AdapterDigest) -> tuple[AdapterDigest, ...]:
    """The adapters that must be in the store: the parts of a mix, else itself."""
    return tuple(part.digest for part in parts_of(digest)) or (digest,)


def not_combinable(reason: str) -> NotCombinable:
    return NotCombinable("adapters_not_combinable", f"model: these adapters cannot be added: {reason}", param="model")
