"""On a GPU: recorded steps give the logits and tokens of plain ones, and adapters arrive while others decode."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from adapters_store.packed.layout import PackedAdapter
from lora_kernels.triton_common.available import triton_switch
from server.engine.model.adapter_copier import ArenaCopier
from server.engine.model.base_model import load_base
from server.engine.model.forward import PendingForward
from server.engine.model.recorded.cuda_graphs import GraphSettings
from server.engine.model.runner import ModelRunner
from server.engine.request import Request, SamplingParams
from server.engine.sampling.sampler import Sampler
from server.engine.schedule import Schedule, ScheduledRow
from server.engine.startup.gpu_start import profile_run
from support.models.packed_forward import pack_folder
from support.servers.service import Service, running

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
PROMPTS = [[10, 11, 12, 13], [50, 51], [7] * 40, [99, 3, 5], list(range(20, 90))]


def answers(service: Service, kinds: list[str | None]) -> list[list[int]]:
    """Greedy tokens of prompts that share their steps."""
    asked = [
        service.ask(prompt, kind, max_tokens=6 + 3 * index)[1]
        for index, (prompt, kind) in enumerate(zip(PROMPTS, kinds, strict=True))
    ]
    return [answer.tokens() for answer in asked]


def runner_of(service: Service) -> ModelRunner:
    runner = service.parts.engine._runner
    assert isinstance(runner, ModelRunner)
    return runner


def test_tokens_are_those_of_the_cpu_with_and_without_recordings(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    kinds = [None, *list(adapters)[:4]]
    with running(base, adapters, tmp_path / "cpu", device="cpu") as service:
        expected = answers(service, kinds)
    with running(base, adapters, tmp_path / "plain", device="cuda", cuda_graphs=False) as service:
        assert runner_of(service).graphs is None
        assert answers(service, kinds) == expected
    with running(base, adapters, tmp_path / "graphs", device="cuda") as service:
        graphs = runner_of(service).graphs
        assert graphs is not None
        assert graphs.failure is None
        assert answers(service, kinds) == expected
        assert answers(service, list(reversed(kinds))) != expected
    assert not triton_switch().off


def test_a_recorded_step_gives_the_logits_of_a_plain_one_and_never_waits(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    with running(base, adapters, tmp_path / "data", device="cuda") as service:
        answers(service, [None, *list(adapters)[:4]])  # brings the adapters to slots 0.. of the table
        service.parts.worker.stop()
        runner = runner_of(service)
        graphs = runner.graphs
        assert graphs is not None
        rows = []
        for index, slot in enumerate((None, 0, 1, 2, 3)):
            request = Request(str(index), "t", [5 + index], SamplingParams(), block_ids=[index], slot=slot)
            rows.append(ScheduledRow(request, 0, 1))
        schedule = Schedule(rows, 5, 5)
        assert graphs.takes(schedule)
        graphs.run(rows)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            recorded = graphs.run(rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        from server.engine.model.batch import Batch

        batch = Batch.build(schedule, block_size=runner.cache.block_size, table=runner.table, device=runner.base.device)
        with torch.inference_mode():
            plain = runner.forward(batch)
        assert (recorded - plain).abs().max() <= 1e-4


def test_launching_ahead_changes_no_token_and_the_launch_never_waits(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    kinds = [None, *list(adapters)[:4]]
    manners = [{"logprobs": 2}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.9, "seed": 4, "top_k": 20}]
    with running(base, adapters, tmp_path, device="cuda") as service:
        runner = runner_of(service)

        def generated() -> list[list[int]]:
            asked = [
                service.ask(PROMPTS[index], kinds[index], max_tokens=40 + index, **manners[index % len(manners)])[1]
                for index in range(len(kinds))
            ]
            return [answer.tokens() for answer in asked]

        runner.overlaps = False
        expected = generated()
        runner.overlaps = True
        before = service.stats().counters["steps_ahead"]
        launch_after = runner.launch_after

        def watched(pending: PendingForward, schedule: Schedule) -> PendingForward | None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return launch_after(pending, schedule)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        runner.launch_after = watched  # type: ignore[method-assign]
        assert generated() == expected
        counters = service.stats().counters
        assert counters["steps_ahead"] > before + 30
        assert counters["isolated_steps"] == 0, "a launch waited for the device"


def test_an_adapter_is_not_overwritten_while_a_launched_forward_still_reads_it(
    base: Path, adapters: dict[str, Path]
) -> None:
    from lora_kernels.background import TimeSlices
    from lora_kernels.lora.batch import LoraTable

    model = load_base(base, dtype="float32", device="cuda")
    packed = pack_folder(next(iter(adapters.values())), model)
    pinned = PackedAdapter(packed.digest, packed.buffer.pin_memory(), packed.modules)
    size = packed.buffer.numel()
    table = LoraTable(torch.full((size,), 5.0, device="cuda"), len(model.description.modules), 1)
    copier = ArenaCopier(table, model.description, TimeSlices())
    torch.cuda._sleep(200_000_000)  # the forward under way, about 0.1 s
    read = table.arena.clone()
    is_copied = copier.start(0, 0, pinned)
    assert not is_copied()
    torch.cuda.synchronize()
    assert bool((read == 5.0).all())
    assert torch.equal(table.arena.cpu(), packed.buffer)
    copier.close()


def test_an_adapter_arrives_on_a_side_stream_whole_and_when_it_says(base: Path, adapters: dict[str, Path]) -> None:
    from lora_kernels.background import TimeSlices
    from lora_kernels.lora.batch import LoraTable

    model = load_base(base, dtype="float32", device="cuda")
    packed = pack_folder(next(iter(adapters.values())), model)
    pinned = PackedAdapter(packed.digest, packed.buffer.pin_memory(), packed.modules)
    table = LoraTable(torch.zeros(2 * packed.buffer.numel() + 64, device="cuda"), len(model.description.modules), 2)
    copier = ArenaCopier(table, model.description, TimeSlices())
    is_copied = copier.start(1, 32, pinned)
    deadline_s = time.monotonic() + 10
    while not is_copied():
        assert time.monotonic() < deadline_s
    assert torch.equal(table.arena[32 : 32 + packed.buffer.numel()].cpu(), packed.buffer)
    for module in packed.modules:
        row = model.description.module_index[module.name]
        assert table.offsets[row, 1].tolist() == [32 + module.a_offset, 32 + module.b_offset]
        assert (int(table.ranks[row, 1]), float(table.scales[row, 1])) == (module.rank, pytest.approx(module.scale))
    copier.close()


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.0}, {"seed": 3}, {"seed": 4, "top_k": 20, "top_p": 0.9}, {"seed": 5, "min_p": 0.1}],
    ids=str,
)
def test_tokens_drawn_on_the_device_are_those_drawn_on_a_cpu(params: dict[str, float]) -> None:
    logits = torch.randn(16, 5000, generator=torch.Generator().manual_seed(0)) * 4
    requests = [Request(str(index), "t", [1], SamplingParams(**params)) for index in range(16)]  # type: ignore[arg-type]
    on_cpu = Sampler().sample(logits, requests).token_ids
    assert Sampler().sample(logits.cuda(), requests).token_ids == on_cpu


def test_a_profile_run_measures_what_a_step_takes(base: Path) -> None:
    model = load_base(base, dtype="bfloat16", device="cuda")
    small, large = (profile_run(model, num_tokens=tokens, num_rows=8, block_size=16) for tokens in (64, 2048))
    assert 0 < small.step_bytes < large.step_bytes
    graphs = GraphSettings(buckets=(4,), max_ranks=(0,))
    assert profile_run(model, num_tokens=64, num_rows=8, block_size=16, graphs=graphs).graph_bytes > 0


def test_nf4_serves_through_its_own_kernel(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options = {"quantize": "nf4", "dtype": "bfloat16", "device": "cuda"}
    with running(base, adapters, tmp_path / "data", **options) as service:
        tokens = answers(service, [None, *list(adapters)[:4]])
    assert [len(own) for own in tokens] == [6, 9, 12, 15, 18]
