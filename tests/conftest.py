"""Puts shared test helpers and the benchmarks' popularity module on the path; keeps torch to one thread."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

LONGEST = (  # these files start first, or one worker ends with them while the other has nothing left
    "kernels/triton/test_interpreter.py",
    "benchmarks/test_benchmarks.py",
    "server/api/edge/test_worst_bodies.py",
    "docs/test_onboarding_page.py",
    "benchmarks/test_gpu_suite.py",
    "server/jobs/gate/test_gate_process.py",
    "trainer/test_run.py",
    "server/cli/common/test_odd_bases.py",
    "server/api/test_schemathesis.py",
    "server/cli/serve/test_serve.py",
    "trainer/model/test_sharding.py",
    "server/engine/test_churn.py",
    "server/engine/test_fairness.py",
    "server/demo/recipe/test_making.py",
    "server/jobs/worker/test_worker.py",
    "server/jobs/worker/test_leader.py",
    "adapters_store/test_kill.py",
    "server/engine/test_exactness.py",
    "server/engine/test_simulation.py",
    "adapters_store/test_faults.py",
)
gc.disable()  # until everything is collected: what imports make stays


freeze, unfreeze = gc.freeze, gc.unfreeze


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--no-loadscope-reorder` the workers take files in this order."""
    order = {HERE / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """Everything that the tests import is never scanned for garbage again. A scan took a second of CPU or more, and
    each engine that a test starts scans all and, as it stops, gives all back to be scanned."""
    gc.collect()
    freeze()
    gc.freeze = gc.unfreeze = lambda: None
    gc.enable()


def pytest_unconfigure() -> None:
    unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _migrations_are_quick() -> Iterator[None]:
    from support.stores.quick_migrations import quicken_migrations  # the path to it is settled above

    with pytest.MonkeyPatch.context() as patch:
        quicken_migrations(patch)
        yield


@pytest.fixture(autouse=True, scope="module")
def _no_event_loop_is_left() -> Iterator[None]:
    """One that a file leaves running, as an open browser does, fails every later test that runs one of its own."""
    yield
    assert asyncio._get_running_loop() is None, "this file leaves an event loop running in the tests' thread"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command run inside a test sets logging up on that test's stderr, which is closed when the test has ended."""
    loggers = (logging.root, logging.getLogger("transformers"))
    before = [(each.handlers.copy(), each.level, each.propagate) for each in loggers]
    yield
    for each, (handlers, level, propagate) in zip(loggers, before, strict=True):
        each.handlers[:] = handlers
        each.setLevel(level)
        each.propagate = propagate
