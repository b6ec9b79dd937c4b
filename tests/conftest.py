"""Puts shared test helpers and the benchmarks' popularity module on the path; keeps torch to one thread."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import ssl
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as the commands do: bitsandbytes then imports no compiler

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

if find_spec("hypothesis"):  # a machine for the GPU's tests has none
    from hypothesis import settings

    # The same examples on every run, each as slow as the machine is; `make test-long` draws new ones.
    settings.register_profile("short", deadline=None, derandomize="MULTILORA_FUZZ" not in os.environ)
    settings.load_profile("short")

LONGEST = (  # these files start first, or one worker ends with them while the others have nothing left
    "benchmarks/test_benchmarks.py",
    "kernels/triton/test_interpreter.py",
    "server/jobs/gate/test_gate_process.py",
    "server/cli/common/test_odd_bases.py",
    "server/cli/serve/test_serve.py",
    "server/jobs/worker/test_worker.py",
    "benchmarks/test_gpu_suite.py",
    "docs/test_onboarding_page.py",
    "server/api/test_schemathesis.py",
    "trainer/test_run.py",
    "server/cli/demo/test_demo.py",
    "server/engine/test_engine.py",
    "server/engine/test_fairness.py",
    "server/jobs/worker/test_leader.py",
    "server/cli/training/test_train.py",
    "server/api/edge/test_worst_bodies.py",
    "server/api/console/test_jobs.py",
    "server/api/console/test_console.py",
    "adapters_store/remote/test_object_blobs.py",
    "trainer/model/test_sharding.py",
    "server/engine/test_churn.py",
    "server/jobs/test_kills.py",
    "server/demo/recipe/test_making.py",
    "trainer/test_failures.py",
    "server/api/test_store_away.py",
    "clients/test_flows.py",
    "server/engine/test_simulation.py",
    "server/engine/test_exactness.py",
    "trainer/run_folder/test_publish.py",
    "server/engine/sampling/test_sampler.py",
    "server/cli/adapters/test_quarantine.py",
    "kernels/triton/test_compile_lora.py",
    "trainer/planner/test_measured.py",
    "adapters_store/test_faults.py",
    "server/jobs/worker/test_supervisor.py",
    "server/jobs/test_store_pair.py",
    "server/cli/adapters/test_adapter_folders.py",
    "server/cli/test_commands_while_serving.py",
    "server/cli/training/test_onboard.py",
    "server/cli/serve/test_open_files.py",
    "server/engine/startup/test_fake_cuda.py",
    "server/cli/test_main.py",
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


@pytest.fixture(autouse=True, scope="session")
def _clients_wait_for_a_busy_machine() -> None:
    """One that a test gives no time-out; httpx would give up after 5 s. A machine for the GPU's tests has no httpx."""
    if find_spec("httpx"):
        from httpx._config import DEFAULT_TIMEOUT_CONFIG

        vars(DEFAULT_TIMEOUT_CONFIG).update(dict.fromkeys(("connect", "read", "write", "pool"), 600.0))


@pytest.fixture(autouse=True, scope="session")
def _certificates_are_read_once() -> Iterator[None]:
    """Every client that a test makes reads all of them, 50 ms of CPU; none asks by TLS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
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
