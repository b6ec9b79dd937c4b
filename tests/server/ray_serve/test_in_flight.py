"""How many requests each replica has, as Ray tells of them; and the router of Ray that reads it."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from server.ray_serve.in_flight import InFlight
from server.ray_serve.router import AffinityRouter


class Holder:
    """Lives as long as a request."""


def test_a_request_counts_from_its_choice_until_its_end_and_once() -> None:
    flight, chosen, answered = InFlight(), Holder(), Holder()
    flight.choose("r1", "a", chosen)
    assert flight.counts() == {"a": 1}
    flight.accept("r1", "a", answered)
    del chosen
    assert flight.counts() == {"a": 1}, "the answer holds it now"
    flight.end("r1", "a")
    assert not flight.counts()


def test_a_request_that_ends_before_it_is_said_to_be_routed_is_not_counted_again() -> None:
    flight, holder = InFlight(), Holder()
    flight.choose("r1", "a", holder)
    flight.end("r1", "a")
    flight.accept("r1", "a", holder)
    assert not flight.counts()


def test_what_one_replica_refused_counts_at_the_next_also_if_the_refusal_is_told_late() -> None:
    flight, holder = InFlight(), Holder()
    flight.choose("r1", "a", holder)
    flight.choose("r1", "b", holder)
    flight.end("r1", "a")
    assert flight.counts() == {"b": 1}
    flight.end("r1", "b")
    assert not flight.counts()


def test_what_a_full_replica_gave_on_is_counted_where_it_is() -> None:
    flight, holder = InFlight(), Holder()
    flight.choose("r1", "a", holder)
    flight.accept("r1", "b", holder)
    assert flight.counts() == {"b": 1}


def test_a_request_that_is_dropped_before_it_was_sent_does_not_count_for_ever() -> None:
    flight, holder, other = InFlight(), Holder(), Holder()
    flight.choose("r1", "a", holder)
    flight.choose("r2", "a", other)
    del holder
    assert flight.counts() == {"a": 1}


def test_the_router_sees_a_burst_that_no_replica_has_answered_yet() -> None:
    """Ray's own request objects and base class. Nothing is sent, so Ray calls no other hook."""

    async def firsts() -> list[str]:
        deployment = DeploymentID("multilora")
        router = AffinityRouter(deployment, DeploymentHandleSource.PROXY)
        router.initialize_state(spill_at=8)
        ids = [ReplicaID(name, deployment) for name in ("one", "two")]
        replicas = [SimpleNamespace(replica_id=each, routing_stats={}) for each in ids]
        pending = [
            PendingRequest([], {}, RequestMetadata(f"r{index}", f"r{index}", session_id="Bearer a key"))
            for index in range(40)
        ]
        chosen = [(await router.choose_replicas(replicas, each))[0][0].replica_id for each in pending]  # type: ignore[arg-type]
        for each, replica_id in zip(pending, chosen, strict=True):
            router.on_request_routed(each, replica_id, each)
            router.on_request_completed(replica_id, each.metadata.internal_request_id)
        again = [(await router.choose_replicas(replicas, each))[0][0].replica_id for each in pending[:8]]  # type: ignore[arg-type]
        assert set(again) == {chosen[0]}, "eight of the key after the burst has ended"
        return [each.unique_id for each in chosen]

    shares = Counter(asyncio.run(firsts()))
    assert sorted(shares.values()) == [16, 24], shares
