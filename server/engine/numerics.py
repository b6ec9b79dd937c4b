"""Decides when an adapter whose numbers are not finite is quarantined. Knows requests and digests; knows no tensors and
no database.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from adapters_store.base.description import AdapterDigest
from adapters_store.packed.mix import is_mix
from server.engine.request import Request

FAULTS_UNTIL_QUARANTINE = 3
CODE = "adapter_numerics"


class TenantAdapter(NamedTuple):
    """A tenant's adapter. Two tenants may hold the same bytes; one tenant's failures are no evidence for the other."""

    tenant: str
    digest: AdapterDigest


# Takes the adapter, a code and a message. The engine's thread calls it: it must not wait for anything.
Quarantine = Callable[[TenantAdapter, str, str], None]


class NumericFaults:
    """Counts each tenant's failed requests by adapter. A single failure may be caused by the prompt; repeated ones are
    the adapter's, for this tenant. Another tenant's adapter with the same bytes is served until its own requests fail.

    A mix of adapters is not counted: its weights may be the reason, and each request brings its own.
    A step in which a request of the base model failed too is not counted: then the base or the machine is at fault.
    """

    def __init__(self, quarantine: Quarantine, *, limit: int = FAULTS_UNTIL_QUARANTINE) -> None:
        self._quarantine = quarantine
        self._limit = limit
        self._counts: Counter[TenantAdapter] = Counter()

    def record(self, failed: Sequence[Request]) -> list[TenantAdapter]:
        """Count one step's requests whose numbers were not finite. Quarantines and returns adapters over the limit.

        Their count starts again at 0: after an operator releases one, it is quarantined after as many further faults.
        """
        owned = [TenantAdapter(request.owner, request.adapter) for request in failed if request.adapter is not None]
        if len(owned) < len(failed):
            return []
        owned = [each for each in owned if not is_mix(each.digest)]
        self._counts.update(owned)
        over = [each for each in dict.fromkeys(owned) if self._counts[each] >= self._limit]
        for each in over:
            message = f"{self._counts.pop(each)} requests produced numbers that are not finite"
            self._quarantine(each, CODE, message)
        return over

    def forget(self, digest: AdapterDigest) -> None:
        """Drop the counts of an adapter that left service."""
        for each in [each for each in self._counts if each.digest == digest]:
            del self._counts[each]
