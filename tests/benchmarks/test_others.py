"""Other projects' kernels are loaded by file, compared first, and left out with the reason where they cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu import others_part
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.others import ways_of
from benchmarks.gpu.others.load import find_source, importable
from benchmarks.gpu.sizes import TOY
from lora_kernels.triton_common.available import triton_switch

FOLDER = "vllm/lora/ops/triton_ops"
METADATA = """
class LoRAKernelMeta:
    @staticmethod
    def make(max_loras, max_num_tokens, device):
        return LoRAKernelMeta()

    def prepare_tensors(self, token_lora_mapping):
        self.slots = token_lora_mapping

    def meta_args(self, token_nums):
        return (self.slots[:token_nums].tolist(),)
"""
SHRINK = """
import torch

from vllm.somewhere import tl, triton
from vllm.elsewhere.utils import direct_register_custom_op


def _shrink(x, a, h, slots, scaling):
    for row, slot in enumerate(slots):
        for member, stack in enumerate(a):
            h[member, row] += (stack[slot, 0].float() @ x[row].float()) * scaling


try:
    direct_register_custom_op(op_name="lora_shrink", op_func=_shrink)
    lora_shrink = torch.ops.vllm.lora_shrink
except AttributeError:
    lora_shrink = _shrink
"""
EXPAND = """
from .kernel_utils import add


def lora_expand(h, b, y, slots, offset_start=0, add_inputs=False):
    assert add_inputs
    for row, slot in enumerate(slots):
        first = offset_start
        for member, stack in enumerate(b):
            add(y[row, first : first + stack.shape[2]], stack[slot, 0].float() @ h[member, row])
            first += stack.shape[2]
"""
KERNEL_UTILS = """
def add(y, delta):
    y += FACTOR * delta.to(y.dtype)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A project laid out as vLLM is, with torch instead of kernels; its packages cannot be imported."""
    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    files = {
        "lora_shrink_op": SHRINK,
        "lora_expand_op": EXPAND,
        "lora_kernel_metadata": METADATA,
        "kernel_utils": KERNEL_UTILS.replace("FACTOR", "1"),
        "utils": "_LORA_A_PTR_DICT = {}",
    }
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    for package in (tmp_path / "vllm", folder):
        (package / "__init__.py").write_text("raise RuntimeError('the whole project')")
    return tmp_path


@pytest.fixture
def bench(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(triton_switch(), "on_cpu", False)
    return Bench(torch.device("cpu"), toy=True, others=(checkout,))


@pytest.fixture
def said(bench: Bench) -> list[str]:
    lines: list[str] = []
    bench.say = lines.append
    return lines


def test_every_case_is_measured_beside_ours_and_compared_first(bench: Bench, said: list[str]) -> None:
    rows = others_part.run(bench)
    assert said == []
    ways = [row["way"] for row in rows]
    assert ways == ["ours", "vllm"] * (2 * len(TOY.rows_adapters) * len(TOY.ranks))
    assert all(0 < float(str(row["error"])) <= others_part.LIMIT and float(str(row["us"])) > 0 for row in rows)


def test_a_wrong_kernel_is_told_and_has_no_time(bench: Bench, said: list[str]) -> None:
    (bench.others[0] / FOLDER / "kernel_utils.py").write_text(KERNEL_UTILS.replace("FACTOR", "1.25"))
    rows = others_part.run(bench)
    theirs = [row for row in rows if row["way"] == "vllm"]
    assert all("us" not in row and "wrong by 0.25" in str(row["left_out"]) for row in theirs)
    assert all("us" in row for row in rows if row["way"] == "ours")
    assert any(line.startswith("vllm: left out, wrong by 0.25") for line in said)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("from vllm.far import away\naway()", "ImportError: vllm.far.away is used and has no substitute"),
    ],
)
def test_what_cannot_be_loaded_is_left_out_with_the_reason(
    line: str, reason: str, bench: Bench, said: list[str]
) -> None:
    (bench.others[0] / FOLDER / "utils.py").write_text(line)
    assert {row["way"] for row in others_part.run(bench)} == {"ours"}
    assert said == [f"vllm in {bench.others[0]}: left out, {reason}"]


def test_h_is_cleared_for_versions_that_add_to_it(bench: Bench, said: list[str]) -> None:
    """The checkout's shrink adds, as those with float atomics do."""
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        rows = others_part.run(bench)
    finally:
        torch.use_deterministic_algorithms(False)
    assert said == []
    assert all("us" in row for row in rows)


def test_a_folder_without_kernels_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    assert ways_of(tmp_path, said.append) == {}
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path}: left out, holds none of vllm/")


def test_the_checkout_its_package_and_its_python_folder_are_all_found(checkout: Path) -> None:
    nested = checkout / "project" / "python"
    nested.mkdir(parents=True)
    (checkout / "vllm").rename(nested / "vllm")
    for path in (nested.parent, nested, nested / "vllm"):
        source = find_source(path, "vllm", (FOLDER,))
        assert source is not None
        assert source.root == nested


def test_an_installed_project_of_the_same_name_is_there_again_afterwards(checkout: Path) -> None:
    installed = type(sys)("vllm")
    sys.modules["vllm"] = installed
    try:
        source = find_source(checkout, "vllm", (FOLDER,))
        assert source is not None
        with importable(source, {}):
            import vllm  # type: ignore[import-not-found]  # the stand-in

            assert vllm is not installed
        assert sys.modules["vllm"] is installed
    finally:
        del sys.modules["vllm"]


def test_the_part_needs_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.main(["--out", str(tmp_path), "--only", "others"])
    assert "--only others needs --others PATH" in capsys.readouterr().err
