"""Drafts from earlier answers: only from the same tenant's with the same adapter, in bounded memory, and no token
changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.engine.request import Request, SamplingParams
from server.engine.scheduling.block_pool import BlockPool, KVCacheSettings
from server.engine.scheduling.phrases import LONG, SHORT, Phrases
from server.engine.scheduling.prompt_lookup import PromptLookup
from support.worlds.driven_engine import Driven, without_and_with_drafts

SAID = list(range(40, 52))
NUM_RUNS = 2 * len(SAID) - SHORT - LONG  # of an answer whose prompt is empty


def request(output: list[int], *, tenant: str = "law", adapter: str | None = "sha256:a", prompt: int = 0) -> Request:
    return Request("r", tenant, [9] * prompt, SamplingParams(max_tokens=50), adapter, output_ids=list(output))


def test_a_long_run_counts_once_seen_and_a_short_one_once_seen_twice() -> None:
    phrases = Phrases()
    phrases.learn(request(SAID))
    assert phrases.draft(request(SAID[:LONG]), 3) == SAID[LONG : LONG + 3]
    assert phrases.draft(request([7, 7, *SAID[:SHORT]]), 3) == []
    phrases.learn(request(SAID))
    assert phrases.draft(request([7, 7, *SAID[:SHORT]]), 50) == SAID[SHORT:]
    assert phrases.draft(request([7, 7, 7]), 3) == []


def test_a_short_run_with_two_followers_is_no_hint() -> None:
    phrases = Phrases()
    for follower in (60, 61, 60, 61):
        phrases.learn(request([1, 2, 3, follower]))
        assert phrases.draft(request([1, 2, 3]), 1) == []
    phrases.learn(request([1, 2, 3, 61]))
    assert phrases.draft(request([1, 2, 3]), 1) == [61]


def test_an_answer_may_begin_as_others_did_after_the_same_end_of_a_prompt() -> None:
    phrases = Phrases()
    phrases.learn(request([5, 6], prompt=20))
    assert phrases.draft(request([], prompt=LONG), 2) == [5, 6]
    assert phrases.draft(request([5], prompt=LONG), 2) == [6]


def test_nothing_comes_from_another_tenant_or_adapter() -> None:
    phrases = Phrases()
    phrases.learn(request(SAID))
    phrases.learn(request(SAID[::-1], adapter=None))
    start = SAID[:LONG]
    assert phrases.draft(request(start), 1) == [SAID[LONG]]
    for other in (request(start, tenant="med"), request(start, adapter="sha256:b"), request(start, adapter=None)):
        assert phrases.draft(other, 1) == []


def test_an_adapter_that_leaves_service_takes_its_answers_along() -> None:
    phrases = Phrases()
    for tenant in ("law", "med"):
        phrases.learn(request(SAID, tenant=tenant))
    phrases.learn(request(SAID, adapter="sha256:b"))
    assert len(phrases) == 3 * NUM_RUNS
    phrases.forget_adapter("sha256:a")
    assert len(phrases) == NUM_RUNS
    assert phrases.draft(request(SAID[:LONG]), 1) == []
    assert phrases.draft(request(SAID[:LONG], adapter="sha256:b"), 1) == [SAID[LONG]]


def test_the_oldest_runs_make_room_within_a_tenant_and_the_oldest_tenants_within_all() -> None:
    phrases = Phrases(most=2 * NUM_RUNS, most_of_one=NUM_RUNS)
    later = [token + 100 for token in SAID]
    phrases.learn(request(SAID))
    phrases.learn(request(later))
    assert len(phrases) == NUM_RUNS
    assert phrases.draft(request(SAID[:LONG]), 1) == []
    assert phrases.draft(request(later[:LONG]), 1) == [later[LONG]]
    for tenant in ("med", "code"):
        phrases.learn(request(SAID, tenant=tenant))
    assert len(phrases) == 2 * NUM_RUNS
    assert phrases.draft(request(later[:LONG]), 1) == []
    assert phrases.draft(request(SAID[:LONG], tenant="med"), 1) == [SAID[LONG]]


@pytest.mark.parametrize("is_kept", [True, False])
def test_answers_are_kept_for_others_only_where_prompts_are(is_kept: bool) -> None:
    pool = BlockPool(KVCacheSettings(num_blocks=8, enable_prefix_cache=is_kept), "sha256:base")
    lookup = PromptLookup(7, pool)
    lookup.forget(request(SAID))
    assert bool(lookup.guess(request(SAID[:LONG]), 2)) == is_kept


@pytest.fixture(scope="module")
def worlds(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Driven]]:
    """The same engine without drafts, and with them."""
    with without_and_with_drafts(base, adapters, tmp_path_factory.mktemp, most=7) as worlds:
        yield worlds


def asked(world: Driven, name: str, adapter: str | None, **params: object) -> tuple[list[int], float, float]:
    """The answer, and how many guessed tokens were computed and right."""
    before = world.counters
    world.add(name, [50, 51, 52, 53, 54, 55], adapter, **{"max_tokens": 24, **params})
    world.drain()
    computed, right = (world.counters[key] - before[key] for key in ("draft_tokens", "accepted_draft_tokens"))
    return world.tokens(name), computed, right


@pytest.mark.parametrize("params", [{}, {"temperature": 1.3, "seed": 5}], ids=["greedy", "seeded"])
def test_a_second_answer_like_the_first_takes_fewer_forwards_and_says_the_same(
    worlds: list[Driven], params: dict[str, object]
) -> None:
    plain, drafting = worlds
    kind = "seeded" if params else "greedy"
    for adapter in ("rank16", None):
        expected, *_ = asked(plain, f"{kind} {adapter}", adapter, **params)
        first, _, right_before = asked(drafting, f"{kind} {adapter} first", adapter, **params)
        second, computed, right = asked(drafting, f"{kind} {adapter} second", adapter, **params)
        assert first == second == expected
        assert right > right_before
        assert right >= 0.9 * computed
        assert right >= 12, "of 24 tokens"


def test_wrong_hints_change_no_token(worlds: list[Driven]) -> None:
    """What a hot answer said is a hint for answers with other seeds."""
    plain, drafting = worlds
    wrong = 0.0
    for seed in range(12):
        expected, *_ = asked(plain, f"hot {seed}", "rank16", temperature=1.6, seed=seed)
        told, computed, right = asked(drafting, f"hot {seed}", "rank16", temperature=1.6, seed=seed)
        assert told == expected
        wrong += computed - right
    assert wrong > 0


def test_a_deleted_adapters_answers_are_forgotten(worlds: list[Driven]) -> None:
    drafting = worlds[1]
    asked(drafting, "before", "rank16")
    phrases = drafting.engine.scheduler.lookup.phrases
    assert phrases is not None
    digest = drafting.digests["rank16"]
    assert any(key[1] == digest for key in phrases._sets)
    drafting.engine.forget_adapter(digest)
    assert not any(key[1] == digest for key in phrases._sets)
