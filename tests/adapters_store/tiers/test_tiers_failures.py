"""A load fails, is stuck, or is healed: every request that waits for the adapter is answered, whenever it asks."""

from __future__ import annotations

import random

import pytest

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import BlobDamaged
from support.worlds.adapter_memory import digest_of
from support.worlds.tiers_bench import Bench, make_bench

A, B, C = (digest_of(name) for name in "abc")
ROUNDS = 60  # far more than a load and a copy take


@pytest.fixture
def bench() -> Bench:
    return make_bench()


def damage(bench: Bench, digest: AdapterDigest) -> BlobDamaged:
    error = bench.disk.errors[digest] = BlobDamaged("blob_unreadable", f"{digest} cannot be read")
    return error


def ask(bench: Bench, *digests: AdapterDigest) -> dict[AdapterDigest, str]:
    """Requests for these wait until each has its adapter or its error: what an engine does at every step."""
    waiting, answers = list(dict.fromkeys(digests)), {}
    for _ in range(ROUNDS):
        bench.tiers.poll()
        failed = bench.tiers.update(waiting).failures
        answers |= {digest: error.code for digest, error in failed.items()}
        answers |= {digest: "ready" for digest in waiting if digest in bench.tiers.ready()}
        waiting = [digest for digest in waiting if digest not in answers]
        if not waiting:
            return answers  # without an update that the list is empty now
        bench.host.load_next()
        bench.device.tick()
    raise AssertionError(f"{waiting} wait for something that never comes")


def test_the_same_list_after_a_failure_is_answered_again_and_again(bench: Bench) -> None:
    damage(bench, A)
    for _ in range(4):
        assert ask(bench, A) == {A: "blob_unreadable"}
        bench.clock.advance(2)


def test_an_adapter_that_is_whole_again_comes_for_the_same_list(bench: Bench) -> None:
    damage(bench, A)
    assert ask(bench, A, B) == {A: "blob_unreadable", B: "ready"}
    bench.disk.errors.clear()
    bench.clock.advance(6)
    assert ask(bench, A) == {A: "ready"}


def test_a_failure_takes_no_room_from_those_that_may_have_it(bench: Bench) -> None:
    damage(bench, A)
    bench.tiers.update([A, B, C], 2)
    bench.host.load_next()
    bench.tiers.poll()
    assert list(bench.tiers.update([A, B, C], 2).failures) == [A]
    bench.settle()
    assert bench.resident() == {B}


def test_a_change_of_the_store_heals_at_once(bench: Bench) -> None:
    damage(bench, A)
    assert ask(bench, A) == {A: "blob_unreadable"}
    bench.disk.errors.clear()
    assert ask(bench, A) == {A: "blob_unreadable"}  # still remembered
    bench.tiers.retry_failed()
    assert ask(bench, A) == {A: "ready"}


def test_a_load_that_began_before_the_store_changed_is_done_again(bench: Bench) -> None:
    damage(bench, A)
    bench.disk.meanwhile = bench.tiers.retry_failed
    bench.tiers.update([A])
    bench.host.load_next()
    bench.disk.errors.clear()
    assert ask(bench, A) == {A: "ready"}


def test_a_load_that_never_ends_fails_those_that_wait_for_it_and_behind_it(bench: Bench) -> None:
    answers: dict[AdapterDigest, str] = {}

    def stuck() -> None:
        bench.clock.advance(59)
        bench.tiers.poll()
        assert not bench.tiers.update([A, B]).failures
        bench.clock.advance(2)
        bench.disk.meanwhile = lambda: None
        answers.update({digest: error.code for digest, error in _want_anew(bench, A, B).items()})

    bench.disk.meanwhile = stuck
    bench.tiers.update([A, B])
    bench.host.load_next()
    assert answers == {A: "adapter_load_stuck", B: "adapter_load_stuck"}
    assert ask(bench, A, B) == {A: "ready", B: "ready"}  # the disk has come back


def _want_anew(bench: Bench, *digests: AdapterDigest) -> dict[AdapterDigest, BlobDamaged]:
    bench.tiers.update([])
    return dict(bench.tiers.update(digests).failures)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_fails_and_heals_no_request_waits_for_ever(seed: int) -> None:
    """Adapters of a random size break, are deleted and are healed while requests for them come one after the other."""
    chance, bench = random.Random(seed), make_bench(max_bytes=160)
    names = [digest_of(name) for name in "abcdef"]
    bench.disk.sizes |= {digest: chance.choice((5, 10, 40, 41)) for digest in names}
    for _ in range(60):
        digest = chance.choice(names)
        match chance.randrange(6):
            case 0:
                damage(bench, digest)
            case 1:
                bench.disk.errors.pop(digest, None)
            case 2:
                bench.tiers.retry_failed()
            case 3:
                bench.tiers.forget(digest)
            case 4:
                bench.clock.advance(chance.choice((0.1, 3, 6)))
            case _:
                ask(bench, *chance.choices(names, k=chance.randrange(1, 4)))
