"""Decides when an adapter whose numbers are not finite is served no more. Knows requests and digests; knows no tensors
and no database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from adapters_store.base.description import AdapterDigest
from server.engine.request import Request

FAULTS_UNTIL_QUARANTINE = 3
CODE = "adapter_numerics"


class Owned(NamedTuple):
    """A tenant's adapter. Two tenants may hold the same bytes; what one asks of them is no evidence for the other."""

    tenant: str
    digest: AdapterDigest


# Whose adapter, code, message. The engine's thread calls it: it must not wait for anything.
Quarantine = Callable[[Owned, str, str], None]


class NumericFaults:
    """Counts each tenant's failed requests by adapter. A single one may be the prompt's doing; the same again is the
    adapter's, for this tenant: another one with the same bytes is served until its own requests fail.

    A step in which a request of the bare base failed as well counts for nobody: then it is the base, or the machine.
    """

    def __init__(self, quarantine: Quarantine, *, limit: int = FAULTS_UNTIL_QUARANTINE) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self._quarantine = quarantine
        self._limit = limit
        self._counts: Counter[Owned] = Counter()

    def saw(self, failed: Sequence[Request]) -> list[Owned]:
        """One step's requests whose numbers were not finite -> adapters to serve no more, each put away already.

        Its count begins anew: an operator who lets it out again has it put away again after as many faults.
        """
        owned = [Owned(request.tenant, request.adapter) for request in failed if request.adapter is not None]
        if len(owned) < len(failed):
            return []
        self._counts.update(owned)
        over = [each for each in dict.fromkeys(owned) if self._counts[each] >= self._limit]
        for each in over:
            message = f"{self._counts.pop(each)} requests produced numbers that are not finite"
            self._quarantine(each, CODE, message)
        return over

    def forget(self, digest: AdapterDigest) -> None:
        """The adapter left service."""
        for each in [each for each in self._counts if each.digest == digest]:
            del self._counts[each]
