"""An engine of two ranks answers as one process does, while its adapters come and go; without a rank it says so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from peft import LoraConfig

from adapters_store.base.families import UnsupportedBase
from adapters_store.errors import AdapterRejected
from server.api.app import create_app
from server.api.background import background
from server.api.settings import ApiSettings
from server.engine.startup.build import build_engine
from server.engine.startup.settings import EngineSettings
from server.engine.tensor_parallel.leader import Leader
from server.engine.tensor_parallel.messages import LoadBase
from server.engine.tensor_parallel.sharded_base import cuts_of
from support.models.models import save_adapter, save_base
from support.models.packed_forward import PackedForward, pack_folder
from support.servers.live_server import serving
from support.servers.service import NUM_TOKENS, Answer, Service, make_base, running
from support.servers.waiting import wait_until

RANKS = 2
NOTICED_S = 50.0  # of the 60 s of a step; a rank that was killed; the sockets of a dead process are closed at once
KINDS = ("plain", None, "rslora", "patterns", "subset", None, "one", "rank16")


@pytest.fixture(scope="module")
def shared(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Three of six adapters fit at once."""
    with running(base, adapters, tmp_path_factory.mktemp("data"), tensor_parallel=RANKS, max_adapters=3) as service:
        yield service


def leader_of(service: Service) -> Leader:
    assert service.parts.leader is not None
    return service.parts.leader


def asked(service: Service, prompts: list[list[int]], **params: Any) -> list[Answer]:
    """All at once, so that they share forwards."""
    with service.held():
        return [service.ask(ids, KINDS[index % len(KINDS)], **params)[1] for index, ids in enumerate(prompts)]


def test_greedy_tokens_of_a_mixed_batch_are_one_processs(
    service: Service, shared: Service, prompts: list[list[int]]
) -> None:
    looping = [ids[:4] * 6 for ids in prompts]  # prompt lookup guesses in these
    for each in (prompts, looping, prompts[::-1]):
        expected, got = ([answer.tokens() for answer in asked(one, each, max_tokens=24)] for one in (service, shared))
        assert got == expected
    counters = shared.stats().counters
    assert counters["adapter_evictions"] > 0
    assert counters["accepted_draft_tokens"] > 0
    assert counters["isolated_steps"] == 0


def test_greedy_tokens_of_a_base_in_nf4_are_one_processs(tmp_path: Path, prompts: list[list[int]]) -> None:
    base = make_base(tmp_path / "base", hidden_size=128, intermediate_size=256, num_attention_heads=8)
    adapter = save_adapter(
        base, tmp_path / "plain", LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"]), seed=1
    )
    answers = []
    for ranks in (1, RANKS):
        options: dict[str, Any] = {"quantize": "nf4", "tensor_parallel": ranks}
        with running(base, {"plain": adapter}, tmp_path / f"data{ranks}", **options) as one:
            assert one.parts.base.quantized
            asked = [one.ask(ids, kind, max_tokens=12)[1] for ids in prompts for kind in ("plain", None)]
            answers.append([answer.tokens() for answer in asked])
    assert answers[0] == answers[1]


def test_logprobs_and_embeddings_are_one_processs(service: Service, shared: Service, prompts: list[list[int]]) -> None:
    prompts = [[min(id_, NUM_TOKENS - 1) for id_ in ids] for ids in prompts]  # the model's last rows have no token
    for one, other in zip(
        *(asked(each, prompts, max_tokens=3, prompt_logprobs=2, logprobs=2) for each in (service, shared)), strict=True
    ):
        expected, got = one.collect(), other.collect()
        found = [[entry.logprob for event in events for entry in event.logprobs or ()] for events in (expected, got)]
        assert found[1] == pytest.approx(found[0], abs=1e-4)
        assert len(found[0]) == 3
    for one, other in zip(
        *(asked(each, prompts, max_tokens=0, pooling="mean") for each in (service, shared)), strict=True
    ):
        first, second = (answer.collect()[-1].embedding for answer in (one, other))
        assert first is not None
        assert second is not None
        assert np.abs(first - second).max() <= 1e-4


def test_every_step_has_the_base_own_sums_and_no_other(shared: Service, prompts: list[list[int]]) -> None:
    leader, layers = leader_of(shared), int(shared.parts.base.config.num_hidden_layers)
    for kind in (None, "rank16"):
        steps, sums = shared.stats().counters["steps"], leader.ranks.num_sums
        answers = [shared.ask(ids, kind, max_tokens=8)[1] for ids in prompts]
        assert all(len(answer.tokens()) == 8 for answer in answers)
        assert leader.ranks.num_sums - sums == 2 * layers * (shared.stats().counters["steps"] - steps)


def test_what_is_not_measured_on_ranks_is_refused_by_name(
    shared: Service, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    packed = pack_folder(adapters["plain"], shared.parts.base)
    with pytest.raises(AdapterRejected, match="int8 is not measured with --tensor-parallel 2; push it without"):
        shared.worker.int8_change(packed, packed).result(60)
    with pytest.raises(
        UnsupportedBase, match=r"--tensor-parallel 3: .*4 attention heads, which 3 ranks cannot share evenly"
    ):
        build_engine(EngineSettings(base=base, tensor_parallel=3, dtype="float32"), shared.store)


def test_each_rank_has_its_heads_keys_and_its_part_of_an_adapter(shared: Service, service: Service) -> None:
    whole, part = service.parts, shared.parts
    assert part.base.num_kv_heads * RANKS == whole.base.num_kv_heads
    assert part.plan.kv_bytes * whole.plan.num_blocks * RANKS == whole.plan.kv_bytes * part.plan.num_blocks
    assert part.plan.base_bytes < whole.plan.base_bytes


def test_a_killed_rank_fails_running_requests_and_turns_health_red(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    with running(base, adapters, tmp_path / "data", tensor_parallel=RANKS) as service:
        settings = ApiSettings(data_dir=tmp_path / "data", auth="off")
        app = create_app(engine=service.worker, store=service.store, settings=settings)
        with background(app), serving(app) as url:
            assert httpx.get(f"{url}/health").status_code == 200
            answers = [service.ask([7, 8, 9], kind, max_tokens=900)[1] for kind in ("plain", None, "rank16")]
            for answer in answers:
                assert answer.events.get(timeout=60).finish_reason is None
            killed_s = time.monotonic()
            os.kill(leader_of(service).followers.processes[0].pid, signal.SIGKILL)
            ends = [answer.collect()[-1] for answer in answers]
            assert time.monotonic() - killed_s < NOTICED_S
            assert [end.error and end.error.code for end in ends] == ["engine_stopped"] * 3
            wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
    assert service.worker.device_error is not None
    assert "rank" in service.worker.device_error


def test_a_rank_that_ends_while_nothing_runs_is_noticed(base: Path, tmp_path: Path) -> None:
    with running(base, {}, tmp_path / "data", tensor_parallel=RANKS) as service:
        assert service.worker.is_healthy()
        killed_s = time.monotonic()
        os.kill(leader_of(service).followers.processes[0].pid, signal.SIGKILL)
        wait_until(lambda: not service.worker.is_healthy())
        assert time.monotonic() - killed_s < NOTICED_S
    assert service.worker.device_error == "rank 1 of 2: ended with exit code -9"


def test_a_rank_that_hangs_fails_a_step_within_the_time_limit(tmp_path: Path) -> None:
    leader = Leader(RANKS, torch.device("cpu"), timeout_s=2.0)
    process = leader.followers.processes[0]
    try:
        path = save_base(tmp_path / "base", "llama")
        base = leader.load_base(path, cuts_of(path, RANKS, dtype="float32"), num_threads=1)
        forward = PackedForward(base, [], num_sequences=1, leader=leader)
        forward.logits([forward.request(0, [3, 4, 5], None)])
        os.kill(process.pid, signal.SIGSTOP)
        start_s = time.monotonic()
        with pytest.raises(RuntimeError):
            forward.logits([forward.request(0, [3, 4, 5], None)])
        assert time.monotonic() - start_s < NOTICED_S
        assert "a step that 2 ranks share failed" in (leader.device_error() or "")
    finally:
        process.kill()  # one that is stopped takes no other end
        leader.close()


def test_a_rank_that_cannot_load_its_part_fails_the_start_with_its_error(tmp_path: Path) -> None:
    leader = Leader(RANKS, torch.device("cpu"))
    try:
        base = make_base(tmp_path / "base")
        (base / "config.json").write_text("{}")
        leader.followers.send(1, LoadBase(str(base), "float32", None, 1))
        with pytest.raises(RuntimeError, match="rank 1 of 2: UnsupportedBase: "):
            leader.followers.answer(1)
    finally:
        leader.close()
