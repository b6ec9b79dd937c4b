"""A job world of its own for each test; its worker is gone at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.servers.job_world import JobWorld


@pytest.fixture
def world(tmp_path: Path) -> Iterator[JobWorld]:
    world = JobWorld(tmp_path)
    yield world
    world.close()


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobWorld]:
    """A world whose worker runs, for tests that leave it alone; jobs have names of their own."""
    world = JobWorld(tmp_path_factory.mktemp("working"))
    world.start_worker("--max-running", "2")
    yield world
    world.close()
