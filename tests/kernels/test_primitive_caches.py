"""Products of hundreds of shapes leave little behind, where they would leave hundreds of megabytes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch

from lora_kernels.process import ALLOCATOR, ALLOCATOR_BEFORE, PRIMITIVE_CACHES, grow_gpu_segments

NUM_SHAPES = 500
MOST_MB = 100.0

CODE = f"""
import re
from pathlib import Path
from lora_kernels.process import keep_few_primitives
%s
import torch
anon_mb = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000
x, weight = torch.randn({NUM_SHAPES}, 64).bfloat16(), torch.randn(64, 64).bfloat16()
torch.nn.functional.linear(x, weight)
before_mb = anon_mb()
for rows in range(1, {NUM_SHAPES}):
    torch.nn.functional.linear(x[:rows], weight)
print(anon_mb() - before_mb)
"""


def python(code: str, own: Mapping[str, str] | None = None) -> str:
    bare = {name: value for name, value in os.environ.items() if name not in PRIMITIVE_CACHES}
    environment = {**bare, **(own or {}), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory through /proc")
def test_shapes_of_a_prompt_do_not_pile_up() -> None:
    assert float(python(CODE % "keep_few_primitives()")) < MOST_MB


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN computes no bf16 on this processor"
)
def test_they_would_without_the_limit() -> None:
    assert float(python(CODE % "")) > 2 * MOST_MB


@pytest.mark.parametrize(("own", "expected"), [({}, "64"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, "7")])
def test_an_operators_own_capacity_is_left_alone(own: dict[str, str], expected: str) -> None:
    code = "import os; from lora_kernels.process import keep_few_primitives; keep_few_primitives(); "
    assert python(code + "print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])", own).strip() == expected


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {ALLOCATOR: "expandable_segments:True"}),
        ({ALLOCATOR: "backend:native"}, {ALLOCATOR: "backend:native"}),
        ({ALLOCATOR_BEFORE: "max_split_size_mb:64"}, {ALLOCATOR_BEFORE: "max_split_size_mb:64"}),
    ],
    ids=["neither set", "set", "set by its older name"],
)
def test_gpu_segments_grow_unless_the_operator_chose_otherwise(
    own: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (ALLOCATOR, ALLOCATOR_BEFORE):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    grow_gpu_segments()
    assert {name: os.environ[name] for name in (ALLOCATOR, ALLOCATOR_BEFORE) if name in os.environ} == expected
