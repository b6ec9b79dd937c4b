"""The start on a GPU, its recordings and a decode step, on CUDA tensors that hold nothing: what a GPU is asked for."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is to run here", allow_module_level=True)

from server.engine.model.base_model import load_base
from server.engine.model.recorded import cuda_graphs
from server.engine.model.runner import ModelRunner
from server.engine.request import Request, SamplingParams
from server.engine.schedule import SchedulerSettings
from server.engine.startup import build, gpu_start
from server.engine.startup.build import EngineParts, join_engine
from server.engine.startup.settings import EngineSettings, MemoryBudget
from server.engine.text.tokenizer import Tokenizer
from support.kernels.fake_cuda import CUDA, FakeCuda, fake_cuda, on_fake_cuda
from support.models.models import FAMILY_NAMES
from support.servers.service import make_base
from support.worlds.any_steps import AdaptersOfEveryRank

pytestmark = pytest.mark.usefixtures("weights_lie_as_on_a_gpu")

FAMILIES = [family for family in FAMILY_NAMES if family != "phi3-longrope"]  # not recorded: it waits for the device
LAUNCHES = {  # of a recorded step of three layers, bare; each layer's attention is not split
    "llama": 36,
    "mistral": 36,
    "qwen2": 36,
    "qwen3": 42,
    "gemma2": 49,
    "gemma3": 52,
    "phi3": 39,
}
OF_ADAPTERS = {"none": 0, "q/k/v": 3 * 2, "attention": 3 * 2 * 2, "all": 3 * 4 * 2 + 2}  # shrink and expand a group
STEP = ["host to device", "index_select", "clamp_", "copy_", "max", "isfinite", "where", "device to host"]
PLAN = [*["host to device"] * 4, "log"]  # how the requests of a changed batch are sampled
MIXED_STEP = ["host to device"] * 2 + ["index_select", *PLAN, "max", "isfinite", "where", "device to host"]
MEMORY = MemoryBudget(kv_cache=1 << 20, adapter_pool=1 << 20, host_cache=1 << 20)


@contextmanager
def started(
    folder: Path, family: str, monkeypatch: pytest.MonkeyPatch, *, max_running: int = 1
) -> Iterator[tuple[EngineParts, FakeCuda]]:
    """As `serve` starts, but for what other tests cover: kernels are not tested, compiled or probed with prompts."""
    path = make_base(folder / family, family)
    base, tokenizer = load_base(path, dtype="bfloat16", device="cpu"), Tokenizer.load(path)
    monkeypatch.setattr(gpu_start, "check_before_use", lambda *_: ())
    monkeypatch.setattr(gpu_start, "compile_kernels", lambda *_, **__: ())
    monkeypatch.setattr(build, "probe", lambda *_: None)
    settings = EngineSettings(
        base=path,
        max_model_len=64,
        block_size=8,
        memory=MEMORY,
        scheduler=SchedulerSettings(max_batch_tokens=32, max_running=max_running),
    )
    with fake_cuda() as cuda:
        on_fake_cuda(base.model)
        parts = join_engine(replace(base, device=CUDA), tokenizer, settings, AdaptersOfEveryRank())
        try:
            yield parts, cuda
        finally:
            parts.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_recordings_ask_for_nothing_and_own_all_that_they_read(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(tmp_path, family, monkeypatch) as (parts, cuda):
        runner = parts.engine._runner
        assert isinstance(runner, ModelRunner)
        assert runner.graphs is not None
        assert runner.graphs.failure is None
        assert cuda.forbidden == []
        assert runner.graphs.num_recorded == len(cuda.captured) == 7
        *others, of_rank_256, of_rank_16, attention, q_k_v, none = [len(launches) for launches in cuda.captured]
        counts = [of_rank_16, attention, q_k_v, none]
        assert {*others, of_rank_256} == {of_rank_16}, "all ranks, int8 and DoRA take the same launches"
        added = [count - LAUNCHES[family] for count in reversed(counts)]
        assert dict(zip(OF_ADAPTERS, added, strict=True)) == OF_ADAPTERS
        request = Request("r", "t", [5, 6, 7], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
        parts.engine.add(request)
        while len(request.output_ids) < 4:
            parts.engine.step()
        before = cuda.num_replays
        cuda.clear()
        parts.engine.step()
        assert cuda.num_replays == before + 1
        assert cuda.waits == []
        assert cuda.launches == STEP, "beside the recording's"
        gc.collect()
        assert [freed for capture in cuda.captures for freed in capture.freed] == []


def test_a_step_with_a_short_prompt_is_replayed_and_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launched plainly it takes 18 to 29 ms of the host, with all of an 8B shape's launches."""
    monkeypatch.setattr(cuda_graphs, "PROMPT_BUCKETS", (8,))
    with started(tmp_path, "llama", monkeypatch, max_running=2) as (parts, cuda):
        greedy = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        parts.engine.add(Request("decodes", "t", [5, 6, 7], greedy))
        parts.engine.step()
        parts.engine.add(Request("prompt", "t", [9] * 6, greedy))
        before = cuda.num_replays
        cuda.clear()
        events = parts.engine.step()
        assert {event.request_id for event in events} == {"decodes", "prompt"}
        assert cuda.num_replays == before + 1
        assert cuda.waits == []
        assert cuda.launches == MIXED_STEP, "beside the recording's"
