"""The request router of a Ray Serve deployment: `ranking` over Ray's replicas. Decides nothing itself.

At an HTTP ingress a router sees headers, not bodies. `serve_multiplexed_model_id` names the model; without it the
header that RAY_SERVE_SESSION_ID_HEADER_KEY names (authorization: a tenant's key) keeps a tenant on one replica.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from server.ray_serve.in_flight import InFlight
from server.ray_serve.ranking import SPILL_AT, Place, ranked

RESIDENTS = "residents"  # of a replica's routing stats


class AffinityRouter(RequestRouter):  # type: ignore[misc]
    """One in each proxy; its loads are of the requests that went through that proxy."""

    def initialize_state(self, spill_at: int = SPILL_AT) -> None:
        """spill_at: as in `ranked`; from request_router_kwargs."""
        self._spill_at = spill_at
        self._in_flight = InFlight()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank: Ray asks the next one if the first does not take the request."""
        if pending_request is None:
            return [list(candidate_replicas)]
        metadata, counts = pending_request.metadata, self._in_flight.counts()
        by_name = {str(replica.replica_id): replica for replica in candidate_replicas}
        places = [
            Place(name, counts[name], frozenset(replica.routing_stats.get(RESIDENTS, ())))
            for name, replica in by_name.items()
        ]
        order = ranked(
            places, model=metadata.multiplexed_model_id, session=metadata.session_id, spill_at=self._spill_at
        )
        if order:
            self._in_flight.choose(metadata.internal_request_id, order[0].name, pending_request)
        return [[by_name[place.name]] for place in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Also if it is not the first one of those chosen: that one's queue was full."""
        self._in_flight.accept(pending_request.metadata.internal_request_id, str(replica_id), result)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._in_flight.end(internal_request_id, str(replica_id))
