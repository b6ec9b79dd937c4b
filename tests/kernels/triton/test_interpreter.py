"""Runs the tests in `interpreted/` under Triton's interpreter, which must be chosen before Triton is first imported."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
ROOT = FOLDER.parents[3]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_kernels_equal_their_references_under_the_interpreter() -> None:
    """All files in one process: what they import takes as long as most of them."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=3000)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    files = sorted(path.name for path in FOLDER.glob("test_*.py"))
    assert files
    assert [name for name in files if not re.search(rf"{name}::.* PASSED", run.stdout)] == []
    assert "SKIPPED" not in run.stdout, run.stdout[-2000:]
