"""Which replica a request goes to."""

from __future__ import annotations

from collections import Counter

from server.ray_serve.ranking import Place, ranked


def first(places: list[Place], *, model: str = "", session: str = "") -> str:
    return ranked(places, model=model, session=session)[0].name


def places(count: int, load: int = 0) -> list[Place]:
    return [Place(f"replica-{index}", load) for index in range(count)]


def test_a_replica_that_has_the_adapter_goes_first() -> None:
    for has_it in range(4):
        each = places(4)
        each[has_it] = Place(f"replica-{has_it}", 3, {"law/style", "law/style@2"})
        assert first(each, model="law/style") == f"replica-{has_it}"
    assert len(ranked(each, model="law/style", session="")) == 4, "the others are asked if it refuses"


def test_a_key_stays_where_it_is_and_only_a_gone_replicas_keys_move() -> None:
    keys = [f"Bearer sk-{index}" for index in range(2000)]
    before = {key: first(places(4), session=key) for key in keys}
    after = {key: first(places(3), session=key) for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != "replica-3")
    shares = Counter(before.values())
    assert min(shares.values()) > 2000 / 4 * 0.85, shares


def test_many_requests_of_one_key_spill_to_the_least_loaded() -> None:
    own = first(places(2), session="a key")
    for load, stays in ((7, True), (8, False)):
        each = [Place(place.name, load if place.name == own else 0) for place in places(2)]
        assert (first(each, session="a key") == own) is stays


def test_a_request_without_a_key_goes_where_least_is_on_its_way() -> None:
    assert first([Place("a", 3), Place("b", 1), Place("c", 2)]) == "b"


def test_of_two_that_have_it_the_same_one_is_taken_every_time() -> None:
    each = [Place(place.name, index, {"m"}) for index, place in enumerate(places(3))]
    assert {first(each[turn:] + each[:turn], model="m") for turn in range(3)} == {first(each, model="m")}
