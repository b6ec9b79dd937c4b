"""Drafts by prompt lookup: answers are token for token those without them, in fewer forwards where text repeats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.engine.request import Request, SamplingParams
from server.engine.schedule import Schedule, ScheduledRow
from server.engine.scheduling.block_pool import BlockPool, KVCacheSettings
from server.engine.scheduling.prompt_lookup import FIRST, PromptLookup
from support.servers.service import TENANT
from support.worlds.driven_engine import Driven, without_and_with_drafts

PHRASE = [40, 41, 42, 43, 44, 45, 46, 47]


def request(prompt: list[int], output: list[int], *, max_tokens: int = 50, **params: object) -> Request:
    wanted = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    return Request("r", "law", list(prompt), wanted, output_ids=list(output))


def pool(num_blocks: int = 64, **settings: object) -> BlockPool:
    return BlockPool(KVCacheSettings(num_blocks=num_blocks, block_size=4, **settings), "sha256:base")  # type: ignore[arg-type]


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    lookup = PromptLookup(7, pool())
    assert lookup.guess(request([*PHRASE, 9], [9, 40, 41, 42]), 3) == [43, 44], "the first draft is short"
    lookup.forget(request([1], []))
    assert lookup.guess(request([1, 2, 3, 4, 5], [6, 7]), 3) == []
    lookup.forget(request([1], []))
    assert lookup.guess(request([9, 1, 2, 3, 8, 1, 2, 3, 7, 1, 2], [3]), 2) == [7, 1], "the latest place counts"


def test_a_loop_is_guessed_beyond_its_end() -> None:
    lookup, loop = PromptLookup(7, pool()), request([5, 6, 5, 6, 5], [6, 5, 6])
    loop.output_ids += [*lookup.guess(loop, 5), 5]
    assert lookup.guess(loop, 5) == [6, 5, 6, 5]


def test_a_token_that_comes_to_the_end_of_the_request_is_looked_up_too() -> None:
    lookup, growing = PromptLookup(7, pool()), request([1, 2, 3, 4, 5, 6, 7, 8], [9])
    for token in (20, 21, 22, 23, 20, 21):
        assert lookup.guess(growing, 4) == []
        growing.output_ids.append(token)
    growing.output_ids.append(22)
    assert lookup.guess(growing, 2) == [23, 20]


def test_drafts_grow_while_they_are_right_and_pause_when_they_are_wrong() -> None:
    lookup, looping = PromptLookup(64, pool()), request([5, 6] * 20, [5])
    first = lookup.guess(looping, 4)
    looping.output_ids += [*first, 6]
    assert len(lookup.guess(looping, 64)) == 2 * len(first)
    looping.output_ids += [5]  # none of them was right: the token drawn first is not theirs
    looping.output_ids[-1] = 90
    looping.output_ids += [5, 6, 5]
    assert lookup.guess(looping, 64), "a loop again"
    before = len(looping.output_ids)
    looping.output_ids.append(91)
    waited = 0
    while not lookup.guess(looping, 64):
        looping.output_ids += [6, 5] if looping.output_ids[-1] != 6 else [5, 6]
        waited = len(looping.output_ids) - before
        assert waited < 100
    assert waited >= 3


def test_a_request_whose_draft_gave_it_no_token_is_not_drafted_again() -> None:
    lookup, looping = PromptLookup(7, pool()), request([5, 6] * 20, [5])
    assert lookup.guess(looping, 4)
    for _ in range(200):
        assert not lookup.guess(looping, 4)
        looping.output_ids += [6, 5]


def scheduled(lookup: PromptLookup, blocks: BlockPool, *requests: Request) -> Schedule:
    """One decode row of each, with the blocks for it."""
    for index, each in enumerate(requests):
        each.id = f"r{index}"
        each.num_computed_tokens = each.num_tokens - 1
        each.block_ids = blocks.allocate(blocks.blocks_for(each.num_tokens))
    rows = [ScheduledRow(each, each.num_computed_tokens, 1) for each in requests]
    schedule = Schedule(rows, len(rows), len(rows))
    lookup.add_drafts(schedule)
    assert schedule.num_tokens == sum(row.num_tokens for row in schedule.rows)
    assert all(not row.draft for row in schedule.rows[: schedule.num_decodes])
    assert all(row.draft and row.samples for row in schedule.rows[schedule.num_decodes :])
    return schedule


def drafts(schedule: Schedule) -> dict[str, int]:
    return {row.request.id: len(row.draft) for row in schedule.rows}


def looping(**params: object) -> Request:
    return request([5, 6] * 6, [5, 6], **params)  # type: ignore[arg-type]


def test_a_forward_gets_no_more_drafts_than_it_has_room_for() -> None:
    for num_rows, expected in ((1, FIRST), (2, 2 * FIRST), (6, 2), (7, 1), (8, 0), (20, 0)):
        blocks = pool(200)
        schedule = scheduled(PromptLookup(7, blocks), blocks, *(looping() for _ in range(num_rows)))
        assert sum(drafts(schedule).values()) == expected
    assert sum(drafts(scheduled(PromptLookup(0, pool()), pool(), looping())).values()) == 0


def test_no_draft_where_a_draw_depends_on_the_last_token() -> None:
    for params in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}):
        assert drafts(scheduled(PromptLookup(7, pool()), pool(), looping(**params))) == {"r0": 0}


def test_a_draft_ends_before_the_answer_does_and_before_its_keys_are_outgrown() -> None:
    assert drafts(scheduled(PromptLookup(7, pool()), pool(), looping(max_tokens=4))) == {"r0": 1}
    assert drafts(scheduled(PromptLookup(7, pool()), pool(), looping(max_tokens=3))) == {"r0": 0}
    blocks = pool(rope_switches=(4, 15, 40))
    assert drafts(scheduled(PromptLookup(7, blocks), blocks, looping())) == {"r0": 1}


def test_a_draft_takes_no_block_that_running_requests_need() -> None:
    for num_blocks, expected in ((4, 1), (5, 1), (6, 2)):  # 15 tokens in four blocks; one block stays free
        blocks = pool(num_blocks)
        schedule = scheduled(PromptLookup(15, blocks), blocks, request([5, 6] * 6, [5, 6, 5]))
        assert drafts(schedule) == {"r0": expected}
        assert blocks.num_free == min(1, num_blocks - 4)


@pytest.fixture(scope="module")
def worlds(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Driven]]:
    """The same engine without prompt lookup, and with it."""
    with without_and_with_drafts(base, adapters, tmp_path_factory.mktemp, most=15) as worlds:
        yield worlds


WAYS: dict[str, dict[str, object]] = {
    "greedy": {},
    "seeded": {"temperature": 0.8, "seed": 3},
    "from the best": {"temperature": 0.9, "seed": 4, "top_k": 5, "top_p": 0.9},
    "biased": {"logit_bias": ((44, 3.0),)},
    "ends early": {"min_tokens": 12, "ignore_eos": False, "logit_bias": ((2, 4.0), (45, 3.9))},
    "log-probabilities": {"logprobs": 2},
    "penalised": {"repetition_penalty": 1.2},
    "stop tokens": {"stop_token_ids": (47,), "logit_bias": tuple((token, 4.0) for token in PHRASE)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adapter", [None, "rank16"])
def test_answers_are_the_same_with_drafts_that_are_right_and_wrong(
    worlds: list[Driven], way: str, adapter: str | None
) -> None:
    told = []
    for world in worlds:
        for index in range(2):
            name = f"{way} {adapter} {index}"
            params = {"max_tokens": 48, **WAYS[way]}
            world.add(name, [*PHRASE * 3, 50 + index, *PHRASE], adapter, **params)
            world.drain()
        told.append([answer_of(world, f"{way} {adapter} {index}") for index in range(2)])
        scheduler = world.engine.scheduler
        assert scheduler.pool.num_free == scheduler.pool.num_blocks
        assert not scheduler.lookup._guessers
    plain, drafted = told
    for one, other in zip(plain, drafted, strict=True):
        assert one[:3] == other[:3]
        assert one[3] == pytest.approx(other[3], abs=1e-4)


def answer_of(world: Driven, name: str) -> tuple[list[int], str, tuple[object, ...], list[float]]:
    events = [event for _, event in world._events(name)]
    last = events[-1]
    assert [event.num_output_tokens for event in events] == list(range(1, len(events) + 1))
    return (
        world.tokens(name),
        "".join(event.text for event in events),
        (last.finish_reason, last.stop_reason, last.num_prompt_tokens, last.num_output_tokens),
        [entry.logprob for event in events for entry in event.logprobs or ()],
    )


def test_drafts_were_right_and_wrong_and_saved_forwards(worlds: list[Driven]) -> None:
    plain, drafted = (world.counters for world in worlds)
    before = [dict(counters) for counters in (plain, drafted)]
    for world in worlds:
        world.add("loop", PHRASE * 8, logit_bias=((44, 100.0),), max_tokens=64)
        world.drain()
    plain, drafted = (
        {name: value - old[name] for name, value in world.counters.items()}
        for world, old in zip(worlds, before, strict=True)
    )
    assert plain["draft_tokens"] == 0
    assert plain["generated_tokens"] == drafted["generated_tokens"] == 64
    assert drafted["accepted_draft_tokens"] == 64 - drafted["steps"]
    assert drafted["steps"] < plain["steps"] / 3
    whole = worlds[1].counters
    assert 0 < whole["accepted_draft_tokens"] < whole["draft_tokens"]


def test_a_tenant_pays_for_the_tokens_it_gets_and_for_no_guess(worlds: list[Driven]) -> None:
    services = []
    for world in worlds:
        account = world.engine.scheduler.shares.account(TENANT)
        before = account.served
        world.add("paid", PHRASE * 5, max_tokens=40)
        world.drain()
        services.append(account.served - before)
    assert services[0] == services[1]
