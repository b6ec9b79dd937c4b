"""The bits of the C kernels are those of the source: what the compiler chooses, by the CPU, changes none of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.source_path import SOURCE_PATH

TUNES = ("znver2", "skylake-avx512")


def bits(folder: Path, tune: str) -> str:
    """As compiled for a CPU of that kind, with the instructions of this one."""
    compiler = folder / f"cc-{tune}"
    compiler.write_text(f'#!/bin/sh\nexec gcc "$@" -mtune={tune}\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CC": str(compiler), "XDG_CACHE_HOME": str(folder), "PYTHONPATH": SOURCE_PATH}
    command = [sys.executable, "-m", "support.kernels.native_bits"]
    done = subprocess.run(command, check=False, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_tuned_for_another_cpu_the_kernels_compute_the_same_bits(tmp_path: Path) -> None:
    assert len({bits(tmp_path, tune) for tune in TUNES}) == 1
