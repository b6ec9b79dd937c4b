"""These files need Triton's interpreter from the first import on: `test_interpreter.py` runs them apart.

Every test here runs under a `MemoryWatch`, in fresh memory full of NaN.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.kernels.memory_watch import MemoryWatch

if os.environ.get("TRITON_INTERPRET") == "1":
    from benchmarks.common.quick_interpreter import quicken_interpreter

    quicken_interpreter()

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def memory_watch() -> Iterator[MemoryWatch]:
    """Programs in random order; the test fails if one reads or writes what it must not."""
    from support.kernels.memory_watch import watched_memory

    with watched_memory() as watch:
        yield watch
    assert watch.findings == []


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """A module whose tensors are mapped and never filled says so by `MAPS_ITS_TENSORS`."""
    from support.kernels.memory_watch import poisoned_memory

    if getattr(request.module, "MAPS_ITS_TENSORS", False):
        yield
        return
    with poisoned_memory(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        yield
