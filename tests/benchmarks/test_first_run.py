"""The first run on a GPU: its script's order, limits and continuation, and what is made for it beforehand."""

from __future__ import annotations

import ast
import json
import os
import platform
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu.prepare_rental import NEEDED, PLATFORMS, in_parts, pinned, resume, trim
from benchmarks.gpu.step_profile import StepProfile

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "first_run.sh"
MOST_FILES = 8
GPU_MARK = "pytest.mark." + "gpu"
STUB = """#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
  *benchmarks.gpu.parts*--out*) [ -n "${FAILS:-}" ] && [ "$3" = "$FAILS" ] && exit 1
    shift 2; name=$1; touch "$3/parts/$name.json"; echo "$name measured";;
  *benchmarks.gpu_suite*) touch "$4/gpu_suite.json" "$4/gpu_suite.png"; echo "the table";;
  *pytest*) echo "5 passed";;
esac
"""


@pytest.fixture
def world(tmp_path: Path) -> dict[str, str]:
    """An environment in which a recorder of calls stands for Python."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    folders = {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work"), "CALLS": str(calls)}
    return {**os.environ, **folders, "PYTHON": str(stub), "HOME": str(tmp_path)}


def run(world: dict[str, str], **changes: str) -> tuple[str, list[str]]:
    """What the script printed, and its calls of Python since the last run."""
    calls = Path(world["CALLS"])
    calls.write_text("")
    done = subprocess.run(
        ["bash", str(SCRIPT)],
        cwd=ROOT,
        env={**world, **changes},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout, calls.read_text().splitlines()


def parts_in(calls: list[str]) -> list[str]:
    return [call.split()[2] for call in calls if call.startswith("-m benchmarks.gpu.parts")]


def is_test_run(call: str) -> bool:
    return call.startswith("-m pytest")


def test_it_runs_every_test_that_needs_a_gpu(world: dict[str, str]) -> None:
    marked = {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if GPU_MARK in path.read_text()
    }
    _, calls = run(world)
    named = {word for call in calls if is_test_run(call) for word in call.split() if word.endswith(".py")}
    assert named == marked


def test_correctness_comes_before_timings_and_few_files_come_back(world: dict[str, str]) -> None:
    printed, calls = run(world)
    kinds = [[*call.split(), ""][1:3] for call in calls]
    first = [index for index, (module, name) in enumerate(kinds) if module == "pytest" or name == "correctness"]
    assert max(first) < kinds.index(["benchmarks.gpu.parts", "attention"])
    assert sorted(parts_in(calls)) == sorted(["correctness", "attention", "nf4", "model", "model_nf4", "lora"])
    assert any(call.startswith("-m benchmarks.gpu.step_profile") for call in calls)
    assert "kernel-tests rc 0: 5 passed" in printed
    assert "the table" in printed
    assert len(list(Path(world["OUT"]).iterdir())) <= MOST_FILES


def test_a_second_call_goes_on_where_the_first_was_cut_off(world: dict[str, str]) -> None:
    printed, _ = run(world, FAILS="model")
    assert "model rc 1" in printed
    printed, calls = run(world)
    assert parts_in(calls) == ["model"]
    assert not any(map(is_test_run, calls))
    assert printed.count("done before") == 2 + 4 + 1  # tests, parts, the profile


def test_nothing_starts_that_no_time_is_left_for(world: dict[str, str]) -> None:
    printed, calls = run(world, BUDGET_S="30")
    assert parts_in(calls) == ["correctness"]
    assert printed.count("no time is left") == 5


def test_a_rehearsal_runs_nothing_on_a_device(world: dict[str, str]) -> None:
    printed, calls = run(world, REHEARSE="1")
    assert printed.rstrip().endswith("rehearsed")
    assert parts_in(calls) == []
    assert all("--co" in call for call in calls if is_test_run(call))
    assert any(map(is_test_run, calls))
    assert not list((Path(world["WORK"]) / "done").glob("*tests"))


@pytest.mark.skipif(not os.environ.get("MULTILORA_REHEARSE"), reason="long: MULTILORA_REHEARSE=1, or its Python's path")
def test_the_rehearsal_collects_and_loads_everything(world: dict[str, str]) -> None:
    chosen = os.environ["MULTILORA_REHEARSE"]
    python = sys.executable if chosen == "1" else chosen
    environment = {**world, "PYTHON": python, "REHEARSE": "1"}
    done = subprocess.run(
        ["bash", str(SCRIPT)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=True
    )
    assert done.stdout.count("rc 0") == 3, done.stdout


MACHINE = {"torch", "jinja2", "markupsafe", "triton", "numpy", "transformers", "peft", "pytest", "safetensors"}
MACHINE |= {"tokenizers", "rich"}
DISTRIBUTIONS = {"re2": "google-re2"}  # by the name that is imported


def imported_by(start: list[Path]) -> set[str]:
    """Packages that these files, and the project's files behind them, import when they are loaded."""
    waiting, seen, packages = [*start], set[Path](), set[str]()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in _modules_loaded_by(ast.parse(path.read_text()).body):
            files = _files_of(name)
            waiting += files
            if not files and name.partition(".")[0] not in OWN:
                packages.add(name.partition(".")[0])
    return packages - set(sys.stdlib_module_names)


OWN = {"server", "adapters_store", "trainer", "benchmarks", "lora_kernels", "support"}


def _modules_loaded_by(body: list[ast.stmt]) -> Iterator[str]:
    """Not those that functions, `try` and `if` import: they may be missing."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module.split(".")[0] in OWN)


def _files_of(module: str) -> list[Path]:
    """The module's file and the `__init__.py` of every package around it, if they are the project's."""
    parts = module.split(".")
    for root in (ROOT, ROOT / "kernels", ROOT / "tests"):
        whole = root.joinpath(*parts)
        if parts[0] in OWN and (whole.with_suffix(".py").is_file() or (whole / "__init__.py").is_file()):
            inits = [root.joinpath(*parts[: end + 1], "__init__.py") for end in range(len(parts))]
            return [path for path in (whole.with_suffix(".py"), *inits) if path.is_file()]
    return []


def test_what_the_gpu_tests_and_the_parts_import_is_on_the_machine_or_travels(world: dict[str, str]) -> None:
    """One that is missing there is noticed before the machine is paid for. peft's part is skipped without peft."""
    _, calls = run(world)
    named = [ROOT / word for call in calls if is_test_run(call) for word in call.split() if word.endswith(".py")]
    around = [folder / "conftest.py" for path in named for folder in path.parents if folder.is_relative_to(ROOT)]
    files = [*named, *(path for path in around if path.is_file()), *(ROOT / "benchmarks" / "gpu").glob("*.py")]
    assert len(files) > 20
    packages = {DISTRIBUTIONS.get(name, name) for name in imported_by(files)}
    assert packages >= {"torch", "sqlalchemy", "numpy"}
    assert packages - MACHINE <= set(NEEDED)


def test_the_wheels_that_travel_are_pinned() -> None:
    assert all("==" in wheel for wheel in pinned(NEEDED, (ROOT / "constraints.txt").read_text()))
    with pytest.raises(ValueError, match="pins no nothing"):
        pinned(["nothing"], "a==1\n")


def test_each_wheel_that_travels_is_for_a_platform_that_is_asked_for() -> None:
    """Pip named no wheel of llguidance (manylinux_2_31), and none of the others was fetched."""
    for name in NEEDED:
        tags = (metadata.distribution(name).read_text("WHEEL") or "").splitlines()
        platforms = {tag.split("-")[-1] for line in tags if line.startswith("Tag:") for tag in line.split(".")}
        assert platforms & {"any", *(f"{each}_{platform.machine()}" for each in PLATFORMS)}, (name, platforms)


def test_a_trimmed_wheel_keeps_the_libraries_of_one_cuda(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    kept = [
        "bitsandbytes/__init__.py",
        "bitsandbytes/libbitsandbytes_cpu.so",
        "bitsandbytes/libbitsandbytes_cuda130.so",
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*kept, "bitsandbytes/libbitsandbytes_cuda118.so", "bitsandbytes/libbitsandbytes_rocm62.so"):
            archive.writestr(name, "x")
    trim(wheel)
    assert sorted(zipfile.ZipFile(wheel).namelist()) == sorted(kept)


def test_parts_of_an_earlier_run_travel_unless_they_were_cut_off(tmp_path: Path) -> None:
    earlier = tmp_path / "gpu_suite.json"
    earlier.write_text(json.dumps({"lora": {"rows": [1]}, "correctness": {"rows": [], "cut_off": True}}))
    resume(earlier, tmp_path / "parts")
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["lora.json"]


@pytest.mark.parametrize("num_parts", [0, 1, 2, 3, 9])
def test_a_cache_that_is_cut_off_holds_what_is_needed_first(num_parts: int) -> None:
    """A process that compiled a hundred kernels was ended by its time limit, and what it had left out was unknown."""
    jobs, compiled, said = [f"kernel {index}" for index in range(25)], list[str](), list[str]()

    def compile_all(part: Sequence[str]) -> dict[str, str]:
        compiled.extend(part)
        return {"kernel 3": "why"} if "kernel 3" in part else {}

    left = in_parts(jobs, compile_all, size=10, has_time=lambda: len(compiled) < 10 * num_parts, say=said.append)
    assert compiled == jobs[: 10 * num_parts]
    assert left == 25 - len(compiled)
    assert ("kernel 3 does not compile: why" in said) == (num_parts > 0)
    assert said[-1:] == ([f"{len(compiled)} of 25 kernels"] if num_parts else [])


def test_what_is_compiled_beforehand_is_what_the_gpu_will_look_for() -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu.compile_for import H200, META, as_on
    from lora_kernels.elementwise.launcher import rms_norm
    from lora_kernels.triton_common.available import triton_switch
    from lora_kernels.triton_common.compile_ahead import asked_for

    x, weight = (torch.empty(shape, dtype=torch.bfloat16, device=META) for shape in ((5, 300), (300,)))
    with as_on(H200):
        (job,) = asked_for(lambda: rms_norm(x, weight, 1e-6))
    assert (job.name, job.target) == ("rms_norm_kernel", ("cuda", 90, 32))
    assert job.attributes[0,] == [["tt.divisibility", 16]]  # as an allocation on a device is
    assert not triton_switch().on_cpu


def test_a_step_profile_counts_kernels_of_the_device_only() -> None:
    gpu, cpu = torch.profiler.DeviceType.CUDA, torch.profiler.DeviceType.CPU
    events = [
        SimpleNamespace(key="nf4_kernel", count=640, device_type=gpu, self_device_time_total=30000.0),
        SimpleNamespace(key="norm_kernel", count=130, device_type=gpu, self_device_time_total=1300.0),
        SimpleNamespace(key="aten::mm", count=99, device_type=cpu, self_device_time_total=0.0),
    ]
    seen = StepProfile.of(4000.0, events, steps=10)
    lines = seen.text("1 rows, 0 adapters").splitlines()
    assert lines[0] == "1 rows, 0 adapters: 4000 us a step, kernels 3130 us (78%) in 77 launches"
    assert [line.split()[-1] for line in lines[1:]] == ["nf4_kernel", "norm_kernel"]
    assert "46.88 us each" in lines[1]
