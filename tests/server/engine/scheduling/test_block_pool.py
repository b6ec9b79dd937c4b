"""Blocks: which request owns them, which may read them again, and which never may."""

from __future__ import annotations

import pytest

from adapters_store.base.description import AdapterDigest
from server.engine.request import Request, SamplingParams
from server.engine.scheduling.block_pool import BlockPool, KVCacheSettings
from support.worlds.adapter_memory import digest_of

A, B = digest_of("a"), digest_of("b")


def make_pool(num_blocks: int = 8, *, base: str = "sha256:base", enable_prefix_cache: bool = True) -> BlockPool:
    settings = KVCacheSettings(num_blocks=num_blocks, block_size=4, enable_prefix_cache=enable_prefix_cache)
    return BlockPool(settings, base)


def make_request(
    prompt: list[int],
    *,
    tenant: str = "law",
    adapter: AdapterDigest | None = A,
    name: str = "r",
    params: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
) -> Request:
    return Request(name, tenant, prompt, params, adapter)


def run(pool: BlockPool, request: Request, *, sampled: int = 99) -> None:
    """Admit the request, compute its prompt and sample one token."""
    assert pool.admit(request, pool.match(request), num_spare=0)
    before, request.num_computed_tokens = request.num_computed_tokens, request.num_tokens
    pool.register(request, before)
    request.num_verified_tokens = request.num_computed_tokens
    request.output_ids.append(sampled)


def finish(pool: BlockPool, request: Request) -> list[int]:
    block_ids = request.block_ids
    pool.release(request, request.num_computed_tokens)
    return block_ids


def test_longest_cached_prefix_of_full_blocks_is_matched() -> None:
    pool = make_pool()
    first = make_request(list(range(11)))
    run(pool, first)
    blocks = finish(pool, first)
    assert pool.match(make_request([*range(8), 50, 51, 52, 53])) == blocks[:2]
    assert pool.match(make_request([0, 1, 2, 3, 50, 51, 52, 53, 54])) == blocks[:1]
    assert pool.match(make_request([50, *range(1, 11)])) == []


def test_at_least_one_token_is_left_to_compute() -> None:
    pool = make_pool()
    first = make_request(list(range(8)))
    run(pool, first)
    assert pool.match(make_request(list(range(8)))) == first.block_ids[:1]
    assert pool.match(make_request(list(range(9)))) == first.block_ids[:2]


@pytest.mark.parametrize(
    "other",
    [
        make_request(list(range(9)), tenant="med"),
        make_request(list(range(9)), adapter=B),
        make_request(list(range(9)), adapter=None),
        make_request(list(range(9)), tenant="lawsha256:", adapter=AdapterDigest("a")),
    ],
    ids=["other tenant", "other version", "base", "same text split elsewhere"],
)
def test_only_the_same_tenant_and_version_hits(other: Request) -> None:
    pool = make_pool(16)
    run(pool, make_request(list(range(9)), name="first"))
    run(pool, make_request(list(range(9)), name="same"))
    assert (pool.stats.hit_tokens, pool.stats.query_tokens) == (8, 18)
    other.block_hashes.clear()
    run(pool, other)
    assert (pool.stats.hit_tokens, pool.stats.query_tokens) == (8, 27)


def test_another_base_gives_blocks_other_names() -> None:
    one, two = make_request(list(range(9))), make_request(list(range(9)))
    run(make_pool(base="sha256:one"), one)
    run(make_pool(base="sha256:two"), two)
    assert one.block_hashes[0] != two.block_hashes[0]


def test_blocks_in_use_by_two_come_back_after_the_second_leaves() -> None:
    pool = make_pool(4)
    first, second = make_request(list(range(9)), name="1"), make_request(list(range(9)), name="2")
    run(pool, first)
    run(pool, second)
    shared = first.block_ids[:2]
    assert second.block_ids[:2] == shared
    assert [pool.ref_count(block) for block in shared] == [2, 2]
    finish(pool, first)
    assert pool.num_free == 1
    finish(pool, second)
    assert pool.num_free == 4


def test_freed_blocks_are_reused_nameless_first_then_the_longest_unused_and_a_prefix_from_its_tail() -> None:
    pool = make_pool(6)
    old, new = make_request(list(range(9)), name="old"), make_request(list(range(20, 29)), name="new")
    run(pool, old)
    run(pool, new)
    old_blocks, new_blocks = finish(pool, old), finish(pool, new)
    nameless = [new_blocks[2], old_blocks[2]]
    assert pool.allocate(6) == [*nameless, old_blocks[1], old_blocks[0], new_blocks[1], new_blocks[0]]


def test_a_reused_block_cannot_be_found_under_its_old_name() -> None:
    pool = make_pool(3)
    first = make_request(list(range(9)))
    run(pool, first)
    finish(pool, first)
    pool.allocate(2)
    assert len(pool.match(make_request(list(range(9))))) == 1
    pool.allocate(1)
    assert pool.match(make_request(list(range(9)))) == []
    assert len(pool._cache) == 0


def test_admission_that_lacks_blocks_changes_nothing() -> None:
    pool = make_pool(4)
    first = make_request(list(range(9)), name="first")
    run(pool, first)
    finish(pool, first)
    long = make_request([*range(9), *range(50, 59)], name="long")
    matched = pool.match(long)
    assert len(matched) == 2
    assert not pool.admit(long, matched, num_spare=0)
    assert not long.block_ids
    assert pool.num_free == 4
    short = make_request(list(range(9)), name="short")
    assert not pool.admit(short, pool.match(short), num_spare=2)
    assert pool.admit(short, pool.match(short), num_spare=1)


def test_matched_blocks_are_not_evicted_by_the_admission_that_reads_them() -> None:
    pool = make_pool(3)
    first = make_request(list(range(9)), name="first")
    run(pool, first)
    blocks = finish(pool, first)
    second = make_request(list(range(9)), name="second")
    assert pool.admit(second, pool.match(second), num_spare=0)
    assert second.block_ids == blocks
    assert len(set(second.block_ids)) == 3


def test_freeing_twice_is_caught() -> None:
    pool = make_pool()
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_prompt_logprobs_need_every_logit_and_do_not_read_the_cache() -> None:
    pool = make_pool()
    run(pool, make_request(list(range(9)), name="first"))
    assert pool.match(make_request(list(range(9)), params=SamplingParams(prompt_logprobs=1))) == []
    assert len(pool.match(make_request(list(range(9))))) == 2


def test_without_prefix_cache_nothing_is_shared() -> None:
    pool = make_pool(enable_prefix_cache=False)
    first, second = make_request(list(range(9)), name="1"), make_request(list(range(9)), name="2")
    run(pool, first)
    run(pool, second)
    assert not set(first.block_ids) & set(second.block_ids)
    assert not first.block_hashes
    assert pool.stats.query_tokens == 0


def test_each_block_is_hashed_once_and_only_when_full() -> None:
    pool = make_pool(16)
    request = make_request(list(range(6)))
    run(pool, request)
    first = request.block_hashes[0]
    for count in range(1, 9):
        if len(request.block_ids) * 4 < request.num_tokens:
            request.block_ids += pool.allocate(1)
        request.num_computed_tokens += 1
        pool.register(request, request.num_computed_tokens - 1)
        request.output_ids.append(count)
        assert len(request.block_hashes) == request.num_computed_tokens // 4
    assert request.block_hashes[0] is first


def test_a_poisoned_block_is_zeroed_only_after_its_last_reader_has_left() -> None:
    pool = make_pool()
    bad, healthy = make_request(list(range(9)), name="bad"), make_request(list(range(9)), name="healthy")
    run(pool, bad)
    run(pool, healthy)
    shared, own = bad.block_ids[:2], bad.block_ids[2:]
    pool.discard(bad.block_ids)
    finish(pool, bad)
    assert pool.take_blocks_to_zero() == own
    assert pool.match(make_request(list(range(9)))) == []
    finish(pool, healthy)
    assert sorted(pool.take_blocks_to_zero()) == sorted(shared)
    assert pool.take_blocks_to_zero() == []


def test_poison_found_after_the_block_was_given_up_is_zeroed_too() -> None:
    pool = make_pool()
    request = make_request(list(range(9)))
    run(pool, request)
    blocks = finish(pool, request)
    pool.discard(blocks[:1])
    assert pool.take_blocks_to_zero() == blocks[:1]
    assert pool.num_free == 8
    assert pool.match(make_request(list(range(9)))) == []


def test_a_request_aborted_in_mid_prompt_leaves_no_unconfirmed_numbers_behind() -> None:
    pool = make_pool()
    request = make_request(list(range(16)))
    assert pool.admit(request, [], num_spare=0)
    request.num_computed_tokens = 10
    pool.register(request, 0)
    assert len(pool.match(make_request(list(range(16))))) == 2  # a twin may read on while it runs
    blocks = finish(pool, request)
    assert pool.match(make_request(list(range(16)))) == []
    assert sorted(pool.take_blocks_to_zero()) == sorted(blocks[:3])


def test_a_finished_request_leaves_its_confirmed_blocks_readable() -> None:
    pool = make_pool()
    request = make_request(list(range(9)))
    run(pool, request)
    finish(pool, request)
    assert pool.take_blocks_to_zero() == []
    assert len(pool.match(make_request(list(range(9))))) == 2


def test_dropping_an_adapter_drops_its_blocks_and_no_others() -> None:
    pool = make_pool(16)
    run(pool, make_request(list(range(9)), name="a"))
    run(pool, make_request(list(range(9)), adapter=B, name="b"))
    run(pool, make_request(list(range(9)), tenant="med", name="med"))
    assert pool.drop_adapter(A) == 4
    assert pool.drop_adapter(A) == 0
    assert pool.match(make_request(list(range(9)))) == []
    assert len(pool.match(make_request(list(range(9)), adapter=B))) == 2


def test_a_block_being_computed_is_announced_until_it_is_there_or_given_up() -> None:
    pool = make_pool(16)
    first, twin = make_request(list(range(9)), name="first"), make_request(list(range(9)), name="twin")
    assert not pool.is_being_computed(twin, 0)
    assert pool.admit(first, [], num_spare=0)
    assert pool.is_being_computed(twin, 0)
    assert not pool.is_being_computed(make_request(list(range(9)), tenant="med"), 0)
    first.num_computed_tokens = 4
    pool.register(first, 0)
    assert not pool.is_being_computed(twin, 0)
    assert pool.is_being_computed(twin, 1)
    finish(pool, first)
    assert not pool.is_being_computed(twin, 1)
