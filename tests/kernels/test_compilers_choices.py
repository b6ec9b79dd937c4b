"""The bits of the C kernels are those of the source: what the compiler chooses, by the CPU, changes none of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.kernels.built_bits import built_bits

TUNES = ("znver2", "skylake-avx512")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_tuned_for_another_cpu_the_kernels_compute_the_same_bits(tmp_path: Path) -> None:
    assert len({built_bits(tmp_path, f"-mtune={tune}") for tune in TUNES}) == 1
