"""Decides when an adapter whose numbers are not finite is served no more. Knows requests and digests; knows no tensors
and no database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from adapters_store.base import AdapterDigest
from server.engine.request import Request

FAULTS_UNTIL_QUARANTINE = 3
CODE = "adapter_numerics"

# Digest, code, message. The engine's thread calls it: it must not wait for anything.
PutAway = Callable[[AdapterDigest, str, str], None]


class NumericFaults:
    """Counts each adapter's failed requests. A single one may be the prompt's doing; the same again is the adapter's.

    A step in which a request of the bare base failed as well counts for nobody: then it is the base, or the machine.
    """

    def __init__(self, put_away: PutAway, *, limit: int = FAULTS_UNTIL_QUARANTINE) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self._put_away = put_away
        self._limit = limit
        self._counts: Counter[AdapterDigest] = Counter()

    def saw(self, failed: Sequence[Request]) -> list[AdapterDigest]:
        """One step's requests whose numbers were not finite -> adapters to serve no more, each put away already.

        Its count begins anew: an operator who lets it out again has it put away again after as many faults.
        """
        digests = [request.adapter for request in failed if request.adapter is not None]
        if len(digests) < len(failed):
            return []
        self._counts.update(digests)
        over = [digest for digest in dict.fromkeys(digests) if self._counts[digest] >= self._limit]
        for digest in over:
            message = f"{self._counts.pop(digest)} requests produced numbers that are not finite"
            self._put_away(digest, CODE, message)
        return over

    def forget(self, digest: AdapterDigest) -> None:
        """The adapter left service."""
        self._counts.pop(digest, None)
