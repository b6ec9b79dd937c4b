"""What is between a server and PostgreSQL: a pooler that keeps sessions apart changes nothing, one that shares them is
refused.

MULTILORA_PGBOUNCER=PATH runs the last two tests through a real PgBouncer; no Python package brings one.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import StaticPool, create_engine

from adapters_store.errors import StoreError
from adapters_store.storage.database import make_engine
from adapters_store.storage.sessions import require_own_sessions
from adapters_store.store import AdapterStore
from server.jobs.worker import leader
from support.servers import postgres
from support.servers.waiting import wait_until

PGBOUNCER = os.environ.get("MULTILORA_PGBOUNCER", "")
through_pgbouncer = pytest.mark.skipif(not PGBOUNCER, reason="MULTILORA_PGBOUNCER names no program")


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.PostgresServer]:
    with postgres.server() as server:
        yield server


@pytest.mark.parametrize(("query", "lock_timeout"), [("", "10s"), ("?options=-c%20lock_timeout%3D3s", "3s")])
def test_limits_are_set_in_the_session_because_poolers_refuse_them_in_the_first_packet(
    server: postgres.PostgresServer, query: str, lock_timeout: str
) -> None:
    engine = make_engine(server.url + query)
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        assert ("options" in driver.info.get_parameters()) == bool(query)
        assert connection.exec_driver_sql("SHOW lock_timeout").scalar_one() == lock_timeout
    with engine.connect() as connection:
        connection.rollback()
        assert connection.exec_driver_sql("SHOW lock_timeout").scalar_one() == lock_timeout
    engine.dispose()


def test_connections_that_share_one_session_are_refused(server: postgres.PostgresServer) -> None:
    own = make_engine(server.url)
    require_own_sessions(own)
    own.dispose()
    shared = create_engine(server.url, poolclass=StaticPool)
    with pytest.raises(StoreError, match="pool_mode = session") as caught:
        require_own_sessions(shared)
    assert caught.value.code == "pooler_shares_sessions"
    shared.dispose()


@contextmanager
def pgbouncer(folder: Path, url: str, pool_mode: str) -> Iterator[str]:
    """`url` through a PgBouncer with its defaults but for the pool's mode and size."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config, log = folder / "pgbouncer.ini", folder / "pgbouncer.log"
    place, _, database = url.rpartition("/")
    lines = ["[databases]", f"* = host=127.0.0.1 port={place.rpartition(':')[2]} user=postgres", "[pgbouncer]"]
    lines += ["listen_addr = 127.0.0.1", f"listen_port = {port}", "unix_socket_dir =", "auth_type = any"]
    config.write_text("\n".join([*lines, f"pool_mode = {pool_mode}", "default_pool_size = 40"]))
    as_owner = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}  # it refuses to run as root
    command = [shutil.which(PGBOUNCER) or PGBOUNCER, "/dev/stdin"]
    with (
        config.open() as stdin,
        log.open("w") as output,
        subprocess.Popen(command, stdin=stdin, stdout=output, stderr=output, cwd="/", **as_owner) as process,  # type: ignore[call-overload]
    ):
        try:
            wait_until(lambda: "process up" in log.read_text(), timeout_s=60)
            yield f"{place.rpartition(':')[0]}:{port}/{database}"
        finally:
            process.terminate()


@through_pgbouncer
def test_behind_pgbouncer_in_session_mode_changes_are_heard_and_one_worker_leads(
    tmp_path: Path, server: postgres.PostgresServer
) -> None:
    with pgbouncer(tmp_path, server.database("by-session"), "session") as url:
        one, other = (AdapterStore.open(tmp_path / "data", database_url=url, poll_s=3600) for _ in range(2))
        with other.following():
            for number in range(60):  # statements are prepared after some calls
                key = one.tenants.create(f"t{number}").api_key
                wait_until(lambda key=key: other.tenants.authenticate(key) is not None)  # type: ignore[misc]
        assert leaders_at_once(tmp_path, url) == 1
        one.close()
        other.close()


def leaders_at_once(folder: Path, url: str) -> int:
    leading, release = threading.Semaphore(0), threading.Event()
    count = [0]

    def lead() -> None:
        with leader.leading(folder, url, tick_s=0.05, lost=release.set):
            count[0] += 1
            leading.release()
            release.wait(2)

    threads = [threading.Thread(target=lead) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert leading.acquire(timeout=60)
    at_once = 1 + leading.acquire(timeout=1)
    release.set()
    for thread in threads:
        thread.join()
    assert count[0] == 2, "the second one leads after the first"
    return at_once


@through_pgbouncer
def test_pgbouncer_in_transaction_mode_is_refused(tmp_path: Path, server: postgres.PostgresServer) -> None:
    with (
        pgbouncer(tmp_path, server.database("by-transaction"), "transaction") as url,
        pytest.raises(StoreError, match="pool_mode = session"),
    ):
        AdapterStore.open(tmp_path / "data", database_url=url)
