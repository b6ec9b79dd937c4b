"""A start compiles every form that a service can need, in processes, under the keys that the launches look for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton
from triton.runtime.jit import JITFunction

from benchmarks.gpu.random_base import random_base
from lora_kernels import self_test
from lora_kernels.check_cases import gate_case, norm_case
from lora_kernels.triton_common.available import triton_switch
from lora_kernels.triton_common.compile_ahead import asked_for, compile_ahead, compile_jobs
from server.engine.model import lora_layers
from server.engine.model.base_model import load_base
from server.engine.model.recorded.cuda_graphs import GraphSettings
from server.engine.startup.covering_steps import StepLimits, launch_covering
from support.kernels.triton_launches import recorded_launches
from support.models.models import FAMILY_NAMES, save_base
from support.worlds.any_steps import SHAPE, any_steps

pytestmark = pytest.mark.usefixtures("weights_lie_as_on_a_gpu")

CPU = torch.device("cpu")
STEPS = int(os.environ.get("MULTILORA_SERVICE_STEPS", "150"))
GRAPHS = GraphSettings(buckets=(1, 4, 20, 40), max_ranks=(0, 16, 256), max_prompt_keys=2000, with_special=True)
LIMITS = StepLimits(max_tokens=96, max_rows=40, max_context=600, graphs=GRAPHS)


@pytest.fixture
def nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_switch(), "_off", {})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's own, empty."""
    folder = tmp_path / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    return folder


def cubins(folder: Path) -> int:
    return len(list(folder.rglob("*.cubin")))


@pytest.mark.parametrize("nf4", [False, True])
def test_a_seeded_service_finds_no_kernel_that_the_start_did_not_have(nf4: bool) -> None:
    """Long form: MULTILORA_SERVICE_STEPS=1500."""
    base = random_base(SHAPE, CPU, nf4=nf4)
    with any_steps(base, LIMITS, block_size=16, seed=3) as service, recorded_launches() as launches:
        launch_covering(base, LIMITS, block_size=16)
        known = {launch.key for launch in launches}
        service.engine._runner.graphs.record_all()  # type: ignore[attr-defined]
        for _ in range(STEPS):
            service.step()
    assert service.num_done > STEPS // 20
    assert {launch.key for launch in launches} - known == set()
    assert {launch.name for launch in launches} >= {"shrink_kernel", "expand_kernel", "join_splits_kernel"}


def test_the_profile_run_alone_does_not_meet_them_all() -> None:
    """Why the covering steps exist: one long prompt and one decode per rank leave forms to the first short prompt."""
    base = random_base(SHAPE, CPU, nf4=False)
    with recorded_launches() as launches:
        launch_covering(base, LIMITS, block_size=16)
    forms = {launch.key for launch in launches if launch.name == "attention_kernel"}
    assert len(forms) == 4  # decodes and prompts, whole and split
    for name in ("shrink_kernel", "expand_kernel"):
        assert len({launch.key for launch in launches if launch.name == name}) >= 2 * 3  # tiles of 16 and 64 rows


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_loading_a_base_launches_nothing(family: str, tmp_path: Path) -> None:
    """On a GPU its kernels would not have been tested yet."""
    with recorded_launches() as launches:
        load_base(save_base(tmp_path / family, family), dtype="bfloat16")
    assert [launch.name for launch in launches] == []


def test_whatever_loads_a_base_has_its_kernels_tested_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server and the gate's process alike."""
    asked: list[tuple[torch.device, torch.dtype]] = []
    monkeypatch.setattr(lora_layers, "check_before_use", lambda *of: asked.append(of))
    load_base(save_base(tmp_path / "llama", "llama"), dtype="bfloat16", device="cpu")
    assert asked == [(CPU, torch.bfloat16)]


def test_processes_compile_under_the_key_that_the_launch_looks_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch_all() -> None:
        norm_case(5, 500, dtype=torch.bfloat16, device=CPU)
        gate_case(3, 70, dtype=torch.bfloat16, device=CPU)

    with recorded_launches():
        compiled = compile_ahead(launch_all, num_processes=2)
        assert (compiled.num_kernels, compiled.num_processes, compiled.failures) == (2, 2, {})
        assert cubins(cache) == 2
        monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", None)
        run = JITFunction.run
        monkeypatch.setattr(JITFunction, "run", lambda self, *a, **o: run(self, *a, **{**o, "warmup": True}))
        launch_all()  # Triton's own way to a kernel, without the launch at its end
    assert cubins(cache) == 2


def test_a_kernel_that_does_not_compile_is_named_and_torch_serves_its_operation(cache: Path, nothing_off: None) -> None:
    with recorded_launches():
        (job,) = asked_for(lambda: norm_case(5, 300, dtype=torch.bfloat16, device=CPU))
    broken = type(job)(**{**vars(job), "signature": {**job.signature, "x_ptr": "*nothing"}})
    failures = compile_jobs([broken], 1)
    assert list(failures) == ["lora_kernels.elementwise.triton_elementwise.rms_norm_kernel"]
    (line,) = self_test.turn_off_uncompiled(failures)
    assert line.startswith("elementwise: ")
    assert "does not compile" in line
    assert set(triton_switch().off) == {"elementwise"}


def test_a_launch_that_fails_turns_its_operation_off_and_the_start_goes_on(cache: Path, nothing_off: None) -> None:
    """Attention's kernels compile here, and then Triton has no driver to launch them with."""
    base = random_base(SHAPE, CPU, nf4=False)
    small = StepLimits(max_tokens=20, max_rows=2, max_context=64)
    with recorded_launches() as launches:
        records = triton.knobs.runtime.jit_cache_hook

        def hook(*, fn: Any, **options: Any) -> bool:
            return "attention_kernel" not in fn.name and bool(records(fn=fn, **options))

        triton.knobs.runtime.jit_cache_hook = hook
        (line,) = self_test.with_failing_ops_off(lambda: launch_covering(base, small, block_size=16))
    assert line.startswith("attention: AttributeError: ")
    assert line.endswith("; torch serves instead, slower")
    assert set(triton_switch().off) == {"attention"}
    assert {launch.name for launch in launches} >= {"shrink_kernel", "expand_kernel", "rms_norm_kernel"}


def test_what_is_no_launch_s_failure_ends_the_start(nothing_off: None) -> None:
    def failing() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        self_test.with_failing_ops_off(failing)
    assert triton_switch().off == {}
