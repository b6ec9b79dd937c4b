"""Real servers that start together on an empty PostgreSQL and an empty data directory: all of them serve.

One pair takes ten seconds of a core, so `make test-fleet` alone runs them; `make test` starts stores, in
`tests/adapters_store/storage/test_store_id.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.servers import postgres
from support.servers.waiting import wait_until

NUM_PAIRS = 10 if os.environ.get("MULTILORA_FLEET") == "long" else 0


@pytest.fixture(scope="module")
def database() -> Iterator[postgres.PostgresServer]:
    with postgres.server() as server:
        yield server


@pytest.mark.parametrize("number", range(NUM_PAIRS))
def test_two_servers_that_start_together_are_both_ready(
    serve_process: Callable[..., Any],
    base: Path,
    tmp_path: Path,
    database: postgres.PostgresServer,
    number: int,
) -> None:
    environment = {"MULTILORA_DATABASE_URL": database.database(f"pair{number}")}
    options = ("--base", base, "--json", "--data-dir", tmp_path / "data")
    with ExitStack() as stack:
        servers = [stack.enter_context(serve_process(*options, env=environment)) for _ in range(2)]
        for server in servers:
            wait_until(server.is_ready, timeout_s=900)
