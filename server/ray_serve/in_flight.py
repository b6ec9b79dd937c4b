"""How many requests each replica has, each counted from the choice of its replica until its end. Pure: knows no Ray.

Ray says that a request was routed only once the replica has answered for it. Counts that begin there are late by a
round trip to a busy replica, and of a burst most would be sent to one.
"""

from __future__ import annotations

import weakref
from collections import Counter


class InFlight:
    """Requests by their ids, replicas by their names.

    holder: an object that lives while the request does. Ray reports no end if a client hangs up before its request was
    sent; then the request counts until its holder is gone.
    """

    def __init__(self) -> None:
        self._replicas: dict[str, tuple[str, weakref.ref[object]]] = {}

    def counts(self) -> Counter[str]:
        return Counter(replica for replica, _ in list(self._replicas.values()))  # a holder may end on any thread

    def choose(self, request_id: str, replica: str, holder: object) -> None:
        """The request is about to be sent there; where it was before, it no longer is."""
        gone = weakref.ref(holder, lambda _: self._replicas.pop(request_id, None))
        self._replicas[request_id] = (replica, gone)

    def accept(self, request_id: str, replica: str, holder: object) -> None:
        """The replica has it. A request that has ended by now, before this was known, stays ended."""
        if request_id in self._replicas:
            self.choose(request_id, replica, holder)

    def end(self, request_id: str, replica: str) -> None:
        """The replica no longer has it. If it refused the request, another one may have been chosen since."""
        if self._replicas.get(request_id, ("",))[0] == replica:
            self._replicas.pop(request_id, None)
