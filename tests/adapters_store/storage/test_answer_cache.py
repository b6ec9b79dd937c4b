"""Remembered answers are given up in time, on a clock of the test's own."""

from __future__ import annotations

from adapters_store.storage.answer_cache import AnswerCache
from support.worlds.adapter_memory import FakeClock


class World:
    """A database with one answer, a generation and a clock."""

    def __init__(self) -> None:
        self.answer, self.generation, self.now, self.loads = "old", 0, 0.0, 0

    def load(self, _: str) -> str:
        self.loads += 1
        return self.answer

    def cache(self) -> AnswerCache[str, str]:
        return AnswerCache(lambda: self.generation, clock=lambda: self.now, max_age_s=0.5)


def test_an_answer_is_loaded_once_while_nothing_is_written() -> None:
    world = World()
    cache = world.cache()
    for _ in range(10):
        world.now += 0.3
        assert cache.get("x", world.load) == "old"
    assert world.loads == 1


def test_another_processes_write_is_seen_within_the_age() -> None:
    world = World()
    cache = world.cache()
    cache.get("x", world.load)
    world.answer, world.generation = "new", 1
    world.now = 0.49
    assert cache.get("x", world.load) == "old"
    world.now = 0.51
    assert cache.get("x", world.load) == "new"


def test_an_own_write_is_seen_at_once() -> None:
    world = World()
    cache = world.cache()
    cache.get("x", world.load)
    world.answer = "new"
    cache.clear()
    assert cache.get("x", world.load) == "new"


def test_an_answer_read_before_a_write_is_not_kept_after_it() -> None:
    world = World()
    cache = world.cache()

    def load_slowly(key: str) -> str:
        answer = world.load(key)
        world.answer = "new"
        cache.clear()
        return answer

    assert cache.get("x", load_slowly) == "old"
    assert cache.get("x", world.load) == "new"


def test_what_loading_raises_is_not_remembered() -> None:
    world = World()
    cache = world.cache()

    def fail(_: str) -> str:
        raise KeyError

    for _ in range(2):
        try:
            cache.get("x", fail)
        except KeyError:
            world.loads += 1
    assert world.loads == 2
    assert cache.get("x", world.load) == "old"


def test_a_peek_answers_only_what_needs_no_look_at_the_database() -> None:
    clock, generations = FakeClock(), []

    def read_generation() -> int:
        generations.append(1)
        return 7

    cache: AnswerCache[str, str] = AnswerCache(read_generation, clock=clock, max_age_s=0.5)
    assert cache.peek("a") is None
    cache.get("a", lambda key: "answer")
    assert cache.peek("a") == "answer"
    clock.advance(0.6)
    assert cache.peek("a") is None
    assert len(generations) == 1
