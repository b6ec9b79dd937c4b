"""LongRoPE: every request gets what transformers' model computes for it alone, by a forward over its own tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.engine.request import Request, SamplingParams
from server.engine.schedule import SchedulerSettings
from server.engine.scheduling.block_pool import BlockPool, KVCacheSettings
from support.models.models import SWITCH, VOCAB, adapter_configs, peft_model, save_adapter
from support.servers.service import NUM_TOKENS, make_base
from support.worlds.driven_engine import Driven, driven

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("longrope"), "phi3-longrope")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    config = adapter_configs(["qkv_proj", "o_proj", "down_proj"])["plain"]
    return {"plain": save_adapter(base, tmp_path_factory.mktemp("adapters") / "plain", config, seed=3)}


def tokens(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def logprobs_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """transformers' own over ids that have a token, [len(ids), NUM_TOKENS], of one forward over the whole sequence."""
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0, :, :NUM_TOKENS].float(), dim=-1)


def assert_is_transformers(world: Driven, name: str, request: Request, model: torch.nn.Module) -> None:
    """Each token the likeliest after a whole forward over all before it, and of that forward's log-probability."""
    entries = [entry for _, event in world._events(name) for entry in event.logprobs or []]
    assert len(entries) == request.params.max_tokens
    known = list(request.prompt_ids)
    for entry in entries:
        expected = logprobs_of(model, known)[-1]
        assert entry.token_id == int(expected.argmax())
        assert abs(entry.logprob - float(expected.max())) <= TOLERANCE
        known.append(entry.token_id)


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("chunk", [None, 7])
def test_a_mixed_batch_answers_as_transformers_answers_each_request_alone(
    base: Path, adapters: dict[str, Path], tmp_path: Path, chunk: int | None, overlaps: bool
) -> None:
    """Short ones, long ones, and some that cross the switch while they decode, of two tenants' weights."""
    models = {None: peft_model(base, None), "plain": peft_model(base, adapters["plain"])}
    lengths = [3, SWITCH - 4, SWITCH - 1, SWITCH, SWITCH + 1, 60, 11]
    scheduler = SchedulerSettings(max_batch_tokens=64, max_running=8, prefill_chunk=chunk)
    with driven(base, adapters, tmp_path, scheduler=scheduler, overlaps=overlaps) as world:
        requests = {}
        for index, length in enumerate(lengths):
            adapter = "plain" if index % 2 else None
            requests[f"r{index}"] = world.add(f"r{index}", tokens(length, index), adapter, max_tokens=12, logprobs=0)
            world.step()
        world.drain()
        assert world.counters["steps_ahead"] > 0 or not overlaps
        for name, request in requests.items():
            assert_is_transformers(world, name, request, models[request.adapter_name])


def test_a_prompts_own_logprobs_are_those_of_one_forward_over_all_of_it(base: Path, tmp_path: Path) -> None:
    model = peft_model(base, None)
    prompts = {"short": tokens(SWITCH - 2, 1), "long": tokens(100, 2)}
    scheduler = SchedulerSettings(max_batch_tokens=32, max_running=8)
    with driven(base, {}, tmp_path, scheduler=scheduler) as world:
        for name, prompt in prompts.items():
            world.add(name, prompt, max_tokens=0, prompt_logprobs=0)
        world.drain()
        for name, prompt in prompts.items():
            expected = logprobs_of(model, prompt)
            found = world.last(name).prompt_logprobs
            assert found is not None
            for position, entry in enumerate(found[1:]):
                assert entry is not None
                assert abs(entry.logprob - float(expected[position, entry.token_id])) <= TOLERANCE


@pytest.mark.parametrize("first", ["long", "short"])
def test_the_prefix_cache_gives_no_keys_of_the_other_factors(base: Path, tmp_path: Path, first: str) -> None:
    model = peft_model(base, None)
    shared = tokens(60, 5)
    prompts = {"long": shared, "short": shared[: SWITCH - 6]}
    order = ["long", "short"] if first == "long" else ["short", "long"]
    with driven(base, {}, tmp_path) as world:
        requests = {}
        for name in [*order, *(f"{name} again" for name in order)]:
            prompt = prompts[name.removesuffix(" again")]
            requests[name] = world.add(name, prompt, max_tokens=4, logprobs=0)
            world.drain()
            assert_is_transformers(world, name, requests[name], model)
        assert [requests[name].num_cached_tokens for name in order] == [0, 0]
        assert requests["long again"].num_cached_tokens == 56
        assert requests["short again"].num_cached_tokens == 16


def test_choices_that_outgrow_their_keys_at_once_in_a_cache_too_small_for_them(base: Path, tmp_path: Path) -> None:
    """Blocks are shared before the switch and not after it: some find none and wait, and all are answered the same."""
    model = peft_model(base, None)
    prompt = tokens(SWITCH - 3, 8)
    with driven(base, {}, tmp_path) as world:
        pool = world.engine.scheduler.pool
        held = pool.allocate(pool.num_free - 9)
        requests = {f"c{index}": world.add(f"c{index}", prompt, max_tokens=8, logprobs=0) for index in range(4)}
        world.drain()
        pool.free(held)
        for name, request in requests.items():
            assert_is_transformers(world, name, request, model)
        assert pool.usage == 0.0


def test_an_outgrown_request_that_waits_hashes_its_blocks_again() -> None:
    """Its tokens passed the switch in the step before it was preempted."""
    pool = BlockPool(KVCacheSettings(num_blocks=8, block_size=4, rope_switches=(8,)), "sha256:base")
    request = Request("r", "law", list(range(8)), SamplingParams())
    assert pool.admit(request, pool.match(request), num_spare=0)
    request.num_computed_tokens = request.num_verified_tokens = 8
    pool.register(request, 0)
    request.output_ids.append(50)
    assert pool.has_outgrown(request)
    pool.release(request, 8)
    assert len(pool._cache) == 2
    assert pool.match(request) == []
    assert not pool.has_outgrown(request)
    assert pool.admit(request, [], num_spare=0)


def test_a_request_that_outgrows_its_keys_is_counted_once_in_the_prefix_cache(base: Path, tmp_path: Path) -> None:
    with driven(base, {}, tmp_path) as world:
        world.add("r", tokens(SWITCH - 3, 8), max_tokens=8)
        world.drain()
        assert world.engine.scheduler.pool.stats.query_tokens == SWITCH - 3
