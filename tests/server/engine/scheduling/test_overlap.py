"""Forwards launched before their predecessors' tokens are read: what clients see is what they would have seen."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch

from server.engine.model.forward import PendingForward, StepOutput
from server.engine.model.runner import ModelRunner
from server.engine.request import TokenEvent
from server.engine.sampling import sampler as sampler_module
from server.engine.schedule import Schedule, ScheduledRow, SchedulerSettings
from server.engine.startup.settings import MemoryBudget
from support.servers.service import TENANT, Answer, greedy_by_peft, running
from support.worlds.driven_engine import MAX_CONTEXT, Driven, driven
from support.worlds.recorded_steps import record_steps

NUM_TOGETHER = 20
NUM_CHURNED = int(os.environ.get("MULTILORA_CHURN_REQUESTS", "160"))


def names_in_cache(world: Driven) -> set[bytes]:
    return set(world.engine.scheduler.pool._cache._block_of)


PROMPT = [9, 8, 7, 6, 5, 4, 30]
EOS = 2


def add_all_kinds(world: Driven, learnt: list[int], text: str) -> None:
    """They fit one step together. learnt, text: what a greedy answer to PROMPT is."""
    first = next(index for index in range(5, 20) if learnt[index] not in learnt[:index])
    stop = next(text[at : at + 2] for at in range(6, len(text)) if text.index(text[at : at + 2]) == at)
    world.add("greedy", PROMPT)
    world.add("seeded", PROMPT, "plain", temperature=1.0, seed=3)
    world.add("best", PROMPT, "rslora", temperature=0.9, seed=4, top_k=20, top_p=0.9)
    world.add("likely", PROMPT, "plain", temperature=1.1, seed=5, min_p=0.02)
    world.add("alternatives", PROMPT, "one", logprobs=3)
    world.add("stop token", PROMPT, stop_token_ids=(learnt[first],))
    world.add("stop string", PROMPT, stop=(stop,))
    world.add("end", PROMPT, "plain", min_tokens=6, ignore_eos=False, logit_bias=((EOS, 100.0),), logprobs=0)
    world.add("aborted", PROMPT, "patterns", max_tokens=100)
    world.add("late", PROMPT, max_tokens=100, deadline_s=world.clock.now_s + 14.5)
    world.add("none", PROMPT, max_tokens=0)
    world.add("one", PROMPT, max_tokens=1)
    world.add("two", PROMPT, "rslora", max_tokens=2)
    world.add("scored", PROMPT, prompt_logprobs=1, logprobs=1, max_tokens=9)


@dataclass
class Told:
    """What one engine said step by step, and what it keeps."""

    steps: list[list[tuple[object, ...]]]
    logprobs: list[float]
    cached: set[bytes]
    service: float
    counters: dict[str, float]


def run_all_kinds(world: Driven) -> Told:
    for kind in ("plain", "rslora", "one", "patterns", None):
        world.add(f"warm {kind}", [50, 51], kind, max_tokens=2)
    world.add("learnt", PROMPT)
    world.drain()
    learnt = world.tokens("learnt")
    text = "".join(event.text for events in world.log for event in events if event.request_id == "learnt")
    before = world.counters
    world.log.clear()
    add_all_kinds(world, learnt, text)
    for index in range(60):
        if index == 9:
            aborted = world.engine.abort("aborted")
            assert aborted is not None
            world.log[-1].append(aborted)
        world.step()
    scheduler = world.engine.scheduler
    assert not scheduler._requests
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    logprobs = [entry.logprob for events in world.log for event in events for entry in event.logprobs or ()]
    return Told(
        [[_without_logprobs(event) for event in events] for events in world.log],
        logprobs,
        names_in_cache(world),
        scheduler.shares.account(TENANT).service,
        {name: value - before[name] for name, value in world.counters.items()},
    )


def _without_logprobs(event: TokenEvent) -> tuple[object, ...]:
    code = None if event.error is None else (event.error.code, event.error.message)
    counts = (event.num_prompt_tokens, event.num_output_tokens, event.num_cached_tokens)
    return event.request_id, tuple(event.token_ids), event.text, event.finish_reason, event.stop_reason, code, counts


def test_step_by_step_the_same_is_said_counted_and_kept(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    told = []
    for overlaps in (False, True):
        with driven(base, adapters, tmp_path / str(overlaps), overlaps=overlaps) as world:
            told.append(run_all_kinds(world))
    plain, ahead = told
    assert ahead.steps == plain.steps
    assert ahead.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    assert (ahead.cached, ahead.service) == (plain.cached, plain.service)
    reasons = {event[0]: event[3:6] for events in plain.steps for event in events if event[3] is not None}
    assert reasons["stop token"][0] == reasons["stop string"][0] == reasons["end"][0] == "stop"
    assert reasons["aborted"][0] == "abort"
    assert reasons["late"][2] is not None
    assert plain.counters.pop("steps_ahead") == 0
    assert ahead.counters.pop("steps_ahead") > 0.8 * ahead.counters["steps"]
    assert ahead.counters == plain.counters


class Recording:
    """A runner that writes down in which order forwards are launched and read."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.order: list[tuple[str, int]] = []
        self._num_launched = 0
        self.fails: Callable[[str, int], bool] = lambda what, number: False

    def launch(self, schedule: Schedule) -> PendingForward:
        return self._seen(lambda: self._runner.launch(schedule))

    def launch_after(self, pending: PendingForward, schedule: Schedule) -> PendingForward | None:
        assert isinstance(pending, RecordedForward)
        return self._seen(lambda: self._runner.launch_after(pending.pending, schedule))

    def _seen(self, launch: Callable[[], PendingForward | None]) -> RecordedForward:
        number, self._num_launched = self._num_launched, self._num_launched + 1
        self.note("launch", number)
        pending = launch()
        assert pending is not None
        return RecordedForward(self, number, pending)

    def note(self, what: str, number: int) -> None:
        self.order.append((what, number))
        if self.fails(what, number):
            raise RuntimeError(f"{what} {number} failed on purpose")

    def run(self, schedule: Schedule) -> StepOutput:
        return self._runner.run(schedule)

    def zero_blocks(self, block_ids: list[int]) -> None:
        self._runner.zero_blocks(block_ids)

    def forget(self, request_id: str) -> None:
        self._runner.forget(request_id)


@dataclass
class RecordedForward:
    recording: Recording
    number: int
    pending: PendingForward

    @property
    def may_be_followed(self) -> bool:
        return self.pending.may_be_followed

    def read(self, rows: Sequence[ScheduledRow]) -> StepOutput:
        self.recording.note("read", self.number)
        return self.pending.read(rows)


@pytest.fixture(scope="module")
def world(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    with driven(base, adapters, tmp_path_factory.mktemp("ahead")) as world:
        yield world


@pytest.fixture
def recording(world: Driven) -> Iterator[Recording]:
    runner = world.runner
    recording = world.engine._runner = Recording(runner)
    world.log.clear()
    yield recording
    world.engine._runner = runner


def test_in_steady_decode_every_forward_but_the_first_is_launched_before_its_predecessor_is_read(
    world: Driven, recording: Recording
) -> None:
    for index in range(4):
        world.add(f"r{index}", [20 + index, 3, 4], max_tokens=101)
    world.drain()
    num_decodes = 100  # after the prompts' forward, number 0
    order = recording.order
    assert order[:2] == [("launch", 0), ("read", 0)]
    ahead = [n for n in range(2, num_decodes + 1) if order.index(("launch", n)) < order.index(("read", n - 1))]
    assert len(ahead) == num_decodes - 1
    assert [number for what, number in order if what == "read"] == list(range(num_decodes + 1))
    for number in range(1, num_decodes - 1):  # never more than two under way
        assert order.index(("read", number)) < order.index(("launch", number + 2))


def test_a_newcomer_is_admitted_in_the_step_after_the_one_that_was_under_way(world: Driven) -> None:
    world.add("old", [5, 6, 7], max_tokens=60)
    for _ in range(10):
        world.step()
    before = world.counters["steps_ahead"]
    newcomer = world.add("new", [8, 9], max_tokens=5)
    world.step()
    assert newcomer.first_scheduled_s is None
    assert world.counters["steps_ahead"] == before
    world.step()
    assert newcomer.first_scheduled_s == world.clock.now_s
    world.drain()
    assert len(world.tokens("old")) == 60


@pytest.mark.parametrize("params", [{"repetition_penalty": 1.3}, {"frequency_penalty": 0.7}, {"presence_penalty": 0.5}])
def test_sampling_that_needs_the_last_token_waits_for_it(world: Driven, params: dict[str, Any]) -> None:
    tokens = []
    for overlaps in (False, True):
        world.runner.overlaps = overlaps
        before = world.counters["steps_ahead"]
        world.log.clear()
        world.add("penalised", [5, 6, 7], max_tokens=20, **params)
        world.add("plain", [5, 6, 7], max_tokens=30)
        world.drain()
        tokens.append((world.tokens("penalised"), world.tokens("plain")))
        assert world.counters["steps_ahead"] - before == (9 if overlaps else 0)  # "plain" alone, less its first
    assert tokens[0] == tokens[1]


def test_a_token_that_the_best_candidates_cannot_tell_is_drawn_again_once_and_then_waited_for(
    world: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "FIRST_CANDIDATES", 4)
    drawn, lasts = [], []
    for overlaps in (False, True):
        world.runner.overlaps = overlaps
        world.log.clear()
        before = world.counters
        for index in range(3):
            world.add(f"flat{index}", [5, 6, 7 + index], temperature=2.0, top_p=0.999, seed=index, max_tokens=40)
        world.add("greedy", [5, 6, 7], max_tokens=60, logprobs=0)
        world.drain()
        drawn.append([world.tokens(name) for name in ("flat0", "flat1", "flat2", "greedy")])
        lasts.append([world.last_step(name) for name in ("flat0", "flat1", "flat2", "greedy")])
        counters = world.counters
        assert counters["generated_tokens"] - before["generated_tokens"] == 180
    assert counters["steps_ahead"] - before["steps_ahead"] >= 15
    assert drawn[0] == drawn[1]
    late = [ahead - plain for plain, ahead in zip(*lasts, strict=True)]
    assert late[3] == 0
    assert all(1 <= steps <= 2 for steps in late[:3]), late
    assert not world.runner.sampler._resample


@pytest.mark.parametrize("fails", [("read", 5), ("launch", 6), ("launch", 5)], ids=str)
def test_a_forward_that_fails_is_repeated_row_by_row_and_what_went_on_from_it_is_dropped(
    world: Driven, recording: Recording, base: Path, fails: tuple[str, int]
) -> None:
    recording.fails = lambda what, number: (what, number) == fails
    before = world.counters["isolated_steps"]
    prompts = {f"r{index}": [20 + index, 3, 4] for index in range(3)}
    for name, prompt in prompts.items():
        world.add(name, prompt, max_tokens=16)
    world.drain()
    for name, prompt in prompts.items():
        assert world.tokens(name) == greedy_by_peft(base, None, prompt, 16)
    assert world.counters["isolated_steps"] == before + 1
    assert world.counters["failed"] == 0


def test_numbers_that_are_not_finite_end_their_request_and_reach_nobody_who_gets_its_blocks(
    world: Driven, base: Path, adapters: dict[str, Path]
) -> None:
    """The row of the forward that was launched ahead goes on from no token, over keys that are NaN."""
    world.log.clear()
    world.add("healthy", [5, 6, 7], max_tokens=40)
    world.add("broken", [8, 9, 10], "plain", max_tokens=40)
    slot = None
    for _ in range(200):
        world.step()
        slot = world.engine.scheduler.running[-1].slot
        if slot is not None and len(world.tokens("broken")) == 6:
            break
    assert slot is not None
    table = world.runner.table
    scales = table.scales.clone()
    table.scales[:, slot] = torch.inf
    for _ in range(2):
        world.step()
    table.scales.copy_(scales)
    assert world.last("broken").error is not None
    assert not all(layer.keys.isfinite().all() for layer in world.runner.cache.layers), "wiped before anybody asked"
    world.add("next", list(range(4, 200)), max_tokens=20)
    world.drain()
    assert world.tokens("healthy") == greedy_by_peft(base, None, [5, 6, 7], 40)
    assert world.tokens("next") == greedy_by_peft(base, None, list(range(4, 200)), 20)
    for layer in world.runner.cache.layers:
        assert layer.keys.isfinite().all()
        assert layer.values.isfinite().all()


def test_an_adapter_may_leave_while_a_forward_of_its_last_request_is_under_way(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """There is room for one adapter: a waiting one takes the room of the one whose last request has just ended."""
    kinds = ["rank16", "plain", "patterns", "rslora"]
    with driven(base, adapters, tmp_path, max_adapters=1) as world:
        alone = {kind: greedy_by_peft(base, adapters[kind], [5, 6, 7], 20) for kind in kinds}
        world.add("base", [5, 6, 7], max_tokens=200)
        for index, kind in enumerate(kinds):
            tokens = alone[kind]
            stop = next(at for at in range(8, 20) if tokens[at] not in tokens[:at])
            world.add(f"r{index}", [5, 6, 7], kind, stop_token_ids=(tokens[stop],))
        world.drain()
        for index, kind in enumerate(kinds):
            got = world.tokens(f"r{index}")
            assert got == alone[kind][: len(got)]
            assert world.last(f"r{index}").finish_reason == "stop"
        assert world.tokens("base") == greedy_by_peft(base, None, [5, 6, 7], 200)
        assert world.counters["adapter_evictions"] == 3
        assert world.counters["steps_ahead"] > 0.5 * world.counters["steps"]


MANNERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "seed": 2, "top_k": 30, "top_p": 0.95},
    {"temperature": 1.2, "seed": 3, "min_p": 0.05, "min_tokens": 4, "stop_token_ids": tuple(range(4, 90))},
    {"temperature": 1.0, "seed": 4, "ignore_eos": False, "logit_bias": ((EOS, 8.0),)},
)


def test_answers_in_a_churn_of_arrivals_hang_ups_preemptions_and_evictions_are_those_of_a_quiet_engine(
    base: Path, adapters: dict[str, Path], prompts: list[list[int]], tmp_path: Path
) -> None:
    rng = random.Random(3)
    limits: dict[str, Any] = {
        "block_size": 4,
        "memory": MemoryBudget(kv_cache=140_000, adapter_pool=4 << 20, host_cache=64 << 20),
        "max_adapters": 3,
        "scheduler": SchedulerSettings(max_batch_tokens=96, max_running=12, starvation_s=0.05, prompt_lookup=0),
    }
    cases = [
        (kind, index, manner)
        for kind in (None, *list(adapters)[:5])
        for index in range(2)
        for manner in range(len(MANNERS))
    ]
    with running(base, adapters, tmp_path, **limits) as service, ExitStack() as first_ones:
        expected = {
            case: service.tokens(prompts[case[1]], case[0], max_tokens=24, **MANNERS[case[2]]) for case in cases
        }
        runner = service.parts.engine._runner
        assert isinstance(runner, ModelRunner)
        record_steps(runner, max_rows=12, max_context=MAX_CONTEXT, max_tokens=128)
        pending: list[tuple[tuple[str | None, int, int], bool, Answer]] = []
        num_whole = 0
        first_ones.enter_context(service.held())  # together, so that blocks are scarce on any machine
        for number in range(NUM_CHURNED):
            if number == NUM_TOGETHER - 1:
                first_ones.close()
            case = rng.choice(cases)
            request_id, answer = service.ask(prompts[case[1]], case[0], max_tokens=24, **MANNERS[case[2]])
            hangs_up = rng.random() < 0.1
            if hangs_up:
                Timer(rng.uniform(0.0, 0.05), service.worker.abort, (request_id,)).start()
            pending.append((case, hangs_up, answer))
            while len(pending) >= (NUM_TOGETHER if number < NUM_CHURNED - 1 else 1):
                case, hangs_up, answer = pending.pop(rng.randrange(min(10, len(pending))))
                events = answer.collect()
                tokens = [token for event in events for token in event.token_ids]
                assert events[-1].finish_reason in ("stop", "length", "abort")
                assert tokens == (
                    expected[case][: len(tokens)] if events[-1].finish_reason == "abort" else expected[case]
                )
                assert hangs_up or events[-1].finish_reason != "abort"
                assert events[-1].num_output_tokens == len(tokens)
                num_whole += events[-1].finish_reason != "abort"
        counters = service.stats().counters
        assert num_whole > 0.8 * NUM_CHURNED
        assert counters["adapter_evictions"] > NUM_CHURNED / 20
        assert counters["preemptions"] > 0
        assert counters["steps_ahead"] > NUM_CHURNED / 4
        pool = service.parts.engine.scheduler.pool
        assert pool.num_free == pool.num_blocks
