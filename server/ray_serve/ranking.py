"""Which replica a request goes to: one that has its adapter, else always the same one, else the least loaded.

Pure: knows neither Ray nor HTTP, so that a test and a benchmark can ask it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

SPILL_AT = 8


@dataclass(frozen=True, slots=True)
class Place:
    """A replica. load: requests on their way. residents: texts that reach an adapter on its device, as `model`."""

    name: str
    load: int
    residents: Collection[str] = ()


def ranked(places: Sequence[Place], *, model: str, session: str, spill_at: int = SPILL_AT) -> list[Place]:
    """The places, the best one first. model, session: "" if the request names none.

    A place that has the adapter goes first; then the hash of the model, or of the session, decides: the same for every
    router, and when a replica comes or goes only its own keys move (rendezvous hashing). A request with neither goes
    where least is on its way. So does one whose first place has `spill_at` more on its way than the least loaded.
    """
    by_load = sorted(places, key=lambda place: (place.load, place.name))
    key = model or session
    if not key:
        return by_load
    has_it = {place.name for place in places if model and model in place.residents}
    ordered = sorted(places, key=lambda place: (place.name not in has_it, -_weight(place.name, key)))
    return by_load if ordered and ordered[0].load >= by_load[0].load + spill_at else ordered


def _weight(name: str, key: str) -> int:
    """Rendezvous hashing (Thaler and Ravishankar, 1998): every pair has a weight, the largest of a key wins."""
    return int.from_bytes(hashlib.blake2b(f"{name}\0{key}".encode(), digest_size=8).digest())
