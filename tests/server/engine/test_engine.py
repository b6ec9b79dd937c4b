"""The whole engine on real weights: exact tokens, whatever else is going on; every request ends once."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from adapters_store.base.description import AdapterDigest
from server.engine.grammar.spec import GrammarSpec
from server.engine.model.forward import StepOutput
from server.engine.model.runner import ModelRunner
from server.engine.request import InvalidRequest, QueueFull, ReasoningIds, Request, SamplingParams, TokenEvent
from server.engine.schedule import Schedule, SchedulerSettings
from server.engine.startup.settings import MemoryBudget
from support.models.grammars import ShortGrammar, short_grammars
from support.models.models import peft_model
from support.servers.service import (
    NUM_TOKENS,
    TENANT,
    Answer,
    Service,
    greedy_by_peft,
    make_base,
    publish,
    running,
    save_adapters,
)

GRAMMARS = short_grammars()
ENDLESS = ShortGrammar(GrammarSpec("regex", "[a-f]{9000}"), 9000, bool)
KINDS = [None, "plain", "rslora", "patterns", "subset", "one", "rank16"]


@pytest.fixture(scope="module")
def expected(service: Service, base: Path, adapters: dict[str, Path], prompts: list[list[int]]) -> list[list[int]]:
    """PEFT's own greedy tokens for prompt i with adapter i."""
    return [
        greedy_by_peft(base, adapters.get(KINDS[index % len(KINDS)] or ""), prompt, 64)
        for index, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def constrained(service: Service, prompts: list[list[int]]) -> list[list[int]]:
    """What prompt i answers under grammar i alone, one after the other."""
    alone = [answer.tokens() for answer in (ask_constrained(service, prompts, [index])[0] for index in range(6))]
    for index, tokens in enumerate(alone):
        GRAMMARS[index % len(GRAMMARS)].check_whole(tokens)
    return alone


def ask_constrained(service: Service, prompts: list[list[int]], indices: Iterable[int]) -> list[Answer]:
    """The prompt and adapter of each index, under a grammar."""
    return [
        service.ask(
            prompts[index], KINDS[index % len(KINDS)], max_tokens=grammar.max_tokens, constraint=grammar.start()
        )[1]
        for index in indices
        for grammar in [GRAMMARS[index % len(GRAMMARS)]]
    ]


def ask_all(service: Service, prompts: list[list[int]], **params: object) -> list[list[int]]:
    with service.held():  # a batch is full on any machine
        answers = [
            service.ask(prompt, KINDS[index % len(KINDS)], max_tokens=64, **params)[1]
            for index, prompt in enumerate(prompts)
        ]
    return [answer.tokens() for answer in answers]


def test_greedy_tokens_of_a_mixed_batch_equal_pefts(
    service: Service, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    assert ask_all(service, prompts) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": SchedulerSettings(max_batch_tokens=16, max_running=16, prefill_chunk=5)},
        {"scheduler": SchedulerSettings(max_batch_tokens=64, max_running=3)},
        {"memory": MemoryBudget(kv_cache=350_000, adapter_pool=4 << 20)},  # 56 blocks of 8 tokens
        {"memory": MemoryBudget(kv_cache=4 << 20, adapter_pool=250_000)},  # room for one large adapter
        {"prefix_cache": False},
        {"max_adapters": 1},
        {"block_size": 32},
    ],
    ids=["small chunks", "three at a time", "preemption", "tiny pool", "no prefix cache", "one slot", "large blocks"],
)
def test_tokens_do_not_depend_on_the_engines_limits(
    base: Path,
    adapters: dict[str, Path],
    prompts: list[list[int]],
    expected: list[list[int]],
    constrained: list[list[int]],
    tmp_path: Path,
    changes: dict[str, object],
) -> None:
    with running(base, adapters, tmp_path, **changes) as service:
        beside = ask_constrained(service, prompts, range(6))
        assert ask_all(service, prompts) == expected
        assert [answer.tokens() for answer in beside] == constrained
        counters = service.stats().counters
    if changes.get("memory") == MemoryBudget(kv_cache=350_000, adapter_pool=4 << 20):
        assert counters["preemptions"] > 0
    if "max_adapters" in changes:
        assert counters["adapter_evictions"] > 0


def test_prefix_cache_hits_for_the_same_tenant_and_version_only(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    prompt = list(range(4, 60))
    with running(base, adapters, tmp_path) as service:

        def cached(adapter: str | None, tenant: str = TENANT) -> int:
            return service.ask(prompt, adapter, tenant=tenant, max_tokens=1)[1].collect()[-1].num_cached_tokens

        assert cached("plain") == 0
        assert cached("plain") == 48  # full blocks of 8, never the whole prompt
        assert cached("plain", "globex") == 0
        assert cached("rslora") == 0
        assert cached(None) == 0
        second = publish(service.store, service.parts, "plain", adapters["rank16"])
        service.versions["plain"] = second
        assert cached("plain") == 0
        assert cached("plain") == 48


def test_a_name_uploaded_again_answers_with_the_new_weights_at_once(
    base: Path, adapters: dict[str, Path], prompts: list[list[int]], tmp_path: Path
) -> None:
    with running(base, {"plain": adapters["plain"]}, tmp_path) as service:
        for kind in ("plain", "rslora", "one", "plain"):
            version = publish(service.store, service.parts, "plain", adapters[kind])
            got = service.tokens(prompts[0], version, max_tokens=24)
            assert got == greedy_by_peft(base, adapters[kind], prompts[0], 24)


def test_deleted_adapter_leaves_both_tiers_and_requests_under_way_come_to_their_end(
    base: Path, adapters: dict[str, Path], prompts: list[list[int]], tmp_path: Path
) -> None:
    with running(base, {"plain": adapters["plain"]}, tmp_path) as service:
        expected = greedy_by_peft(base, adapters["plain"], prompts[0], 200)
        _, answer = service.ask(prompts[0], "plain", max_tokens=200)
        answer.events.get(timeout=300)
        digests = service.store.delete(TENANT, "plain")
        service.worker.forget_adapters(digests)
        assert len(digests) == 1
        assert answer.tokens() == expected[1:]
        late = service.ask(prompts[0], "plain")[1].collect()[-1]
        assert late.finish_reason == "error"
        assert late.error is not None
        assert service.parts.engine.tiers.resident() == []


def test_every_event_says_how_many_tokens_of_reasoning_there_were(
    service: Service, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    close = expected[0][20]
    end = expected[0].index(close) + 1
    _, answer = service.ask(prompts[0], KINDS[0], max_tokens=64, reasoning=ReasoningIds(None, close))
    counts = [(event.num_output_tokens, event.num_reasoning_tokens) for event in answer.collect()]
    assert counts == [(count, min(count, end)) for count, _ in counts]
    assert counts[-1] == (64, end)


def test_aborted_requests_end_once_and_give_their_blocks_back(service: Service, prompts: list[list[int]]) -> None:
    asked = [
        service.ask(prompt, "plain", max_tokens=500, constraint=ENDLESS.start() if index % 2 else None)
        for index, prompt in enumerate(prompts)
    ]
    for request_id, _ in asked:
        service.worker.abort(request_id)
    for _, answer in asked:
        assert answer.collect()[-1].finish_reason == "abort"
    service.tokens(prompts[0])
    pool = service.parts.engine.scheduler.pool
    assert pool.num_free == pool.num_blocks
    assert all(resident.ref_count == 0 for resident in service.parts.engine.tiers.resident())
    gc.collect()
    assert not ENDLESS.living, "a matcher outlived its request"


def test_unknown_digest_fails_that_request_only(service: Service, prompts: list[list[int]]) -> None:
    ghost = service.versions["plain"]
    object.__setattr__(ghost_copy := type(ghost)(**_fields(ghost)), "digest", AdapterDigest("sha256:" + "0" * 64))
    _, failing = service.ask(prompts[0], ghost_copy)
    healthy = service.tokens(prompts[1], "plain")
    final = failing.collect()[-1]
    assert final.finish_reason == "error"
    assert final.error is not None
    assert final.error.code
    assert len(healthy) == 16


def _fields(version: object) -> dict[str, object]:
    return {name: getattr(version, name) for name in type(version).__dataclass_fields__}  # type: ignore[attr-defined]


def test_too_long_prompt_is_refused_with_field_and_limit(service: Service) -> None:
    with pytest.raises(InvalidRequest, match="1024") as refused:
        service.ask([5] * 2000)
    assert refused.value.param == "prompt"
    with pytest.raises(InvalidRequest) as refused:
        service.ask([5] * 8, max_tokens=5000)
    assert refused.value.param == "max_tokens"


def test_full_queue_is_refused_with_a_time_to_come_back(base: Path, tmp_path: Path) -> None:
    with running(base, {}, tmp_path, scheduler=SchedulerSettings(max_running=1, max_waiting=2)) as service:
        answers = []

        def ask_until_refused() -> None:
            for _ in range(8):
                answers.append(service.ask([5] * 9, max_tokens=400)[1])  # noqa: PERF401  the last one raises

        with pytest.raises(QueueFull) as refused:
            ask_until_refused()
        assert refused.value.retry_after_s > 0
        assert all(len(answer.tokens()) == 400 for answer in answers)


def test_prompt_logprobs_equal_the_models_own(service: Service, base: Path, prompts: list[list[int]]) -> None:
    model, prompt = peft_model(base, None), prompts[2]
    with torch.inference_mode():
        exact = model(torch.tensor([prompt])).logits[0, :, :NUM_TOKENS].log_softmax(-1)
    for max_tokens in (0, 1, 3):
        first = service.ask(prompt, None, max_tokens=max_tokens, prompt_logprobs=2, logprobs=1)[1].collect()[0]
        assert first.prompt_logprobs is not None
        assert first.prompt_logprobs[0] is None
        for position, entry in enumerate(first.prompt_logprobs[1:], start=1):
            assert entry is not None
            assert entry.token_id == prompt[position]
            assert entry.logprob == pytest.approx(float(exact[position - 1, prompt[position]]), abs=1e-3)
            assert len(entry.top) == 2
        assert len(first.prompt_logprobs) == len(prompt)


def test_a_forward_that_fails_on_one_request_fails_that_request_only(
    service: Service, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ModelRunner.run
    marked = prompts[3]

    def run_unless_marked(self: ModelRunner, schedule: Schedule) -> StepOutput:
        if any(row.request.prompt_ids == marked for row in schedule.rows):
            raise RuntimeError("a kernel refused this shape")
        return run(self, schedule)

    expected = [service.tokens(prompt, "plain") for prompt in prompts[:3]]
    monkeypatch.setattr(ModelRunner, "run", run_unless_marked)
    asked = [service.ask(prompt, "plain")[1] for prompt in prompts[:4]]
    assert [answer.tokens() for answer in asked[:3]] == expected
    final = asked[3].collect()[-1]
    assert final.error is not None
    assert final.error.code == "engine_error"
    assert service.worker.is_healthy()


def test_non_finite_adapter_fails_its_own_requests_and_leaves_no_trace(
    base: Path, adapters: dict[str, Path], prompts: list[list[int]], tmp_path: Path
) -> None:
    with running(base, {"plain": adapters["plain"], "rslora": adapters["rslora"]}, tmp_path) as service:
        healthy_alone = service.tokens(prompts[0], "rslora", max_tokens=32)
        service.tokens(prompts[1], "plain", max_tokens=1)  # on the device now
        table = service.parts.adapters.table
        slot = next(
            r.slot for r in service.parts.engine.tiers.resident() if r.digest == service.versions["plain"].digest
        )
        table.scales[:, slot] = torch.inf
        _, healthy = service.ask(prompts[0], "rslora", max_tokens=32)
        _, broken = service.ask(prompts[1], "plain", max_tokens=32)
        final = broken.collect()[-1]
        assert final.error is not None
        assert final.error.code == "adapter_numerics"
        assert healthy.tokens() == healthy_alone
        assert ask_all(service, prompts[:1]) is not None
        for layer in service.parts.worker._engine._runner.cache.layers:  # type: ignore[attr-defined]
            service.tokens([7] * 700, None, max_tokens=1)  # walks over every block
            assert torch.isfinite(layer.keys).all()
            assert torch.isfinite(layer.values).all()
            break


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3"])
def test_other_families_generate_what_peft_generates(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / family, family)
    adapters = save_adapters(base, tmp_path / "adapters")
    prompt = list(range(10, 50))
    with running(base, adapters, tmp_path / "data") as service:
        asked = {kind: service.ask(prompt, kind, max_tokens=64)[1] for kind in ("plain", "patterns", "subset")}
        for kind, answer in asked.items():
            assert answer.tokens() == greedy_by_peft(base, adapters[kind], prompt, 64)


def test_a_request_whose_event_loop_is_closed_ends_and_leaves_nothing(
    service: Service, prompts: list[list[int]]
) -> None:
    heard = threading.Event()

    def closed(event: TokenEvent) -> None:
        heard.set()
        raise RuntimeError("Event loop is closed")

    request = Request("deaf", TENANT, prompts[0], SamplingParams(max_tokens=200, ignore_eos=True))
    service.worker.submit(request, closed)
    assert heard.wait(60)
    assert service.stats().num_running == 0
    assert "deaf" not in service.worker._listeners
    assert service.worker.is_healthy()
