"""Every class of database error gets its right answer, provoked in real databases: SQLite's file and a PostgreSQL."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from adapters_store.errors import StoreError, StoreUnavailable
from adapters_store.storage import database
from adapters_store.storage.database_errors import kind_of
from adapters_store.store import AdapterStore
from support.servers import postgres
from support.servers.held_database import READING_TOO, WRITING, held
from support.servers.racing import race


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.PostgresServer]:
    with postgres.server() as server:
        yield server


@pytest.fixture
def on_postgres(data_dir: Path, server: postgres.PostgresServer) -> Iterator[AdapterStore]:
    store = AdapterStore.open(data_dir, database_url=server.database(f"errors-{time.monotonic_ns()}"))
    store.tenants.create("acme")
    yield store
    store.close()


@pytest.fixture
def hasty(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AdapterStore]:
    """On SQLite, waiting half a second for a lock instead of ten."""
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 0.5)
    store = AdapterStore.open(data_dir)
    store.tenants.create("acme")
    yield store
    store.close()


def code_of(call: Callable[[], object]) -> tuple[str, bool]:
    """And whether the caller may come back."""
    with pytest.raises(StoreError) as caught:
        call()
    return caught.value.code, isinstance(caught.value, StoreUnavailable)


def test_sqlites_lock_held_by_another_process(hasty: AdapterStore, data_dir: Path) -> None:
    with held(data_dir / "multilora.db", WRITING):
        assert code_of(lambda: hasty.tenants.create("late")) == ("store_unavailable", True)
        assert [each.name for each in hasty.tenants.list_tenants()] == ["acme"], "readers are not away for it"
    hasty.tenants.create("late")


def test_sqlite_closed_to_readers_too_is_away_and_waited_for_by_one_alone(tmp_path: Path) -> None:
    """Others are refused at once: a server's threads would all wait ten seconds each."""
    data_dir = tmp_path / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "_BUSY_TIMEOUT_S", 4.0)
        store = AdapterStore.open(data_dir)
        store.database.engine.dispose()
        with held(data_dir / "multilora.db", READING_TOO):
            first_s = timed(lambda: code_of(store.tenants.list_tenants))
            second_s = timed(lambda: code_of(store.tenants.list_tenants))
        assert second_s < first_s / 4
        store.close()


def timed(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def test_sqlites_damaged_file(data_dir: Path) -> None:
    store = AdapterStore.open(data_dir)
    store.close()
    for leftover in data_dir.glob("multilora.db-*"):
        leftover.unlink()
    path = data_dir / "multilora.db"
    with path.open("r+b") as file:
        file.write(b"not a database" * 300)
    assert code_of(store.tenants.list_tenants) == ("database_damaged", False)
    assert code_of(lambda: AdapterStore.open(data_dir)) == ("database_damaged", False)


def test_postgresql_whose_connections_are_cut(on_postgres: AdapterStore, server: postgres.PostgresServer) -> None:
    """In the middle of a transaction; the next one has a new connection."""

    def cut_off() -> None:
        with on_postgres.database.read() as connection:
            connection.execute(text("SELECT 1"))
            server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
            connection.execute(text("SELECT 1"))

    assert code_of(cut_off) == ("store_unavailable", True)
    time.sleep(0.6)
    assert [each.name for each in on_postgres.tenants.list_tenants()] == ["acme"]


def test_postgresqls_rows_locked_by_another(
    data_dir: Path, server: postgres.PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 1)
    url = server.database(f"locked-{time.monotonic_ns()}")
    store = AdapterStore.open(data_dir, database_url=url)
    with psycopg.connect(url.replace("+psycopg", "")) as other:
        other.execute("SELECT * FROM store_state FOR UPDATE")
        assert code_of(lambda: store.tenants.create("late")) == ("store_unavailable", True)
        assert store.tenants.list_tenants() == [], "readers are not away for it"
    store.tenants.create("late")
    store.close()


def test_postgresql_that_only_reads(on_postgres: AdapterStore, server: postgres.PostgresServer) -> None:
    """A standby after a failover."""
    name = on_postgres.database.engine.url.database
    server.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    on_postgres.database.engine.dispose()
    assert code_of(lambda: on_postgres.tenants.create("x")) == ("read_only", False)
    assert [each.name for each in on_postgres.tenants.list_tenants()] == ["acme"]


def test_postgresql_with_no_connection_left(on_postgres: AdapterStore, server: postgres.PostgresServer) -> None:
    server.execute("CREATE ROLE few LOGIN CONNECTION LIMIT 0")
    url = on_postgres.database.engine.url.set(username="few").render_as_string(hide_password=False)
    engine = database.make_engine(url)
    with pytest.raises(OperationalError) as caught:
        engine.connect()
    assert kind_of(caught.value) == "away"
    engine.dispose()


def test_a_statement_that_is_cancelled(on_postgres: AdapterStore) -> None:
    def slow() -> None:
        with on_postgres.database.write() as connection:
            connection.execute(text("SET LOCAL statement_timeout = 50"))
            connection.execute(text("SELECT pg_sleep(60)"))

    assert code_of(slow) == ("store_unavailable", True)


def test_writers_that_meet_come_one_after_the_other(on_postgres: AdapterStore, data_dir: Path) -> None:
    """Two servers create the same tenant: one has it, the other is told so; no constraint's error."""
    url = on_postgres.database.engine.url.render_as_string(hide_password=False)
    other = AdapterStore.open(data_dir, database_url=url)
    for number in range(20):
        outcomes = race([lambda s=s, n=number: s.tenants.create(f"t{n}") for s in (on_postgres, other)])
        codes = sorted(getattr(each, "code", str(type(each))) for each in outcomes if each is not None)
        assert codes == ["tenant_exists"]
    other.close()


@pytest.mark.parametrize(
    ("statement", "error"),
    [("INSERT INTO store_state VALUES (1, 0)", IntegrityError), ("SELECT * FROM nowhere", ProgrammingError)],
)
def test_a_fault_of_ours_is_not_dressed_as_the_databases(
    on_postgres: AdapterStore, statement: str, error: type[Exception]
) -> None:
    with pytest.raises(error), on_postgres.database.read() as connection:
        connection.execute(text(statement))


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("database or disk is full", "full"),
        ("disk I/O error", "full"),
        ("attempt to write a readonly database", "read_only"),
        ("database disk image is malformed", "damaged"),
        ("unable to open database file", "away"),
        ("no such table: tenants", None),
    ],
)
def test_sqlites_words(words: str, kind: str | None) -> None:
    assert kind_of(OperationalError("SELECT", {}, sqlite3.OperationalError(words))) == kind
