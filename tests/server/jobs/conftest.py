"""A job world of its own for each test; its worker is gone at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.job_world import JobWorld


@pytest.fixture
def world(tmp_path: Path) -> Iterator[JobWorld]:
    world = JobWorld(tmp_path)
    yield world
    world.close()
