"""Only the engine's thread keeps compute threads; a loader and a main thread that once computed have none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os, threading, torch
from lora_kernels.process import release_compute_threads
torch.set_num_threads(4)
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
torch.ones(1 << 20).add_(1)
made = tasks() - before
release_compute_threads()
left = tasks() - before
torch.ones(1 << 20).add_(1)
print(made, left, tasks() - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads through /proc")
def test_released_threads_are_gone_and_come_back_when_needed() -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "0", "3"]


@pytest.mark.parametrize(
    ("own", "expected"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "none")]
)
def test_spinning_is_brief_unless_the_operator_says_otherwise(own: dict[str, str], expected: str) -> None:
    code = "import os; from lora_kernels.process import spin_briefly; spin_briefly(); "
    code += "print(os.environ.get('GOMP_SPINCOUNT', 'none'))"
    bare = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env={**bare, **own}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_nothing_here_imports_torch() -> None:
    code = "import sys, lora_kernels.process, server.cli.main; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
