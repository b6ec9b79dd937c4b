"""Two servers' meters on one real PostgreSQL: together they give what the quota allows, and no more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from statistics import median, quantiles

import pytest
from sqlalchemy import Engine, event, text

from adapters_store.accounts import meter_rows
from adapters_store.accounts.meter_rows import Amounts, Levels, Take
from adapters_store.accounts.records import Quotas
from adapters_store.accounts.shared_meters import SharedMeters
from adapters_store.store import AdapterStore
from support.servers import postgres
from support.servers.waiting import wait_until
from support.worlds.fleet import IS_LONG

ONE = Amounts(requests=1, tokens=10, sequences=1)
SLOW = Quotas(requests_per_minute=60, tokens_per_minute=6000, max_concurrent=2)


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.PostgresServer]:
    with postgres.server() as server:
        yield server


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, server: postgres.PostgresServer) -> Iterator[AdapterStore]:
    store = AdapterStore.open(tmp_path_factory.mktemp("meters") / "data", database_url=server.url)
    yield store
    store.close()


@pytest.fixture
def tenant(store: AdapterStore) -> str:
    return store.tenants.create(f"t{time.monotonic_ns()}").tenant


@contextmanager
def meters(store: AdapterStore) -> Iterator[SharedMeters]:
    own = SharedMeters(store.database.url)
    own.start(patience_s=60)
    assert own.is_connected
    yield own
    own.stop()


def ask(own: SharedMeters, tenant: str, quotas: Quotas, amounts: Amounts = ONE) -> Levels | None:
    answered, found = threading.Event(), list[Levels | None]()

    def answer(levels: Levels | None) -> None:
        found.append(levels)
        answered.set()

    own.take(Take(tenant=tenant, quotas=quotas, needs=amounts, takes=amounts), answer)
    assert answered.wait(300)
    return found[0]


def is_given(own: SharedMeters, tenant: str, quotas: Quotas, amounts: Amounts = ONE) -> bool:
    levels = ask(own, tenant, quotas, amounts)
    assert levels is not None
    return levels.is_taken


def test_two_servers_together_give_what_one_would_give(store: AdapterStore, tenant: str) -> None:
    quotas = Quotas(requests_per_minute=30, tokens_per_minute=10_000)
    with meters(store) as a, meters(store) as b, ThreadPoolExecutor(4) as pool:
        start_s = time.monotonic()
        given = list(pool.map(lambda n: is_given((a, b)[n % 2], tenant, quotas), range(100)))
        refilled = (time.monotonic() - start_s) * 30 / 60
        assert 30 <= sum(given) <= 30 + refilled + 1
        levels = ask(a, tenant, quotas, Amounts())
        assert levels is not None
        assert levels.tokens is not None
        assert levels.tokens >= 10_000 - 10 * sum(given)


def test_sequences_count_on_all_servers_until_they_end(store: AdapterStore, tenant: str) -> None:
    with meters(store) as a, meters(store) as b:
        assert is_given(a, tenant, SLOW)
        assert is_given(b, tenant, SLOW)
        for own in (a, b):
            assert not is_given(own, tenant, SLOW)
        a.give_back(tenant, SLOW, Amounts(tokens=4, sequences=1))
        assert is_given(a, tenant, SLOW)
        assert not is_given(b, tenant, SLOW)
    with meters(store) as c:
        assert is_given(c, tenant, SLOW, Amounts(sequences=2)), "servers that have stopped hold nothing"


def test_never_more_sequences_at_once_than_the_quota(store: AdapterStore, tenant: str) -> None:
    quotas = Quotas(max_concurrent=2)
    running, most, lock = 0, 0, threading.Lock()

    def call(own: SharedMeters) -> None:
        nonlocal running, most
        for _ in range(100 if IS_LONG else 20):
            if not is_given(own, tenant, quotas):
                continue
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.001)
            with lock:
                running -= 1
            own.give_back(tenant, quotas, Amounts(sequences=1))

    with meters(store) as a, meters(store) as b, meters(store) as c, ThreadPoolExecutor(6) as pool:
        for each in [pool.submit(partial(call, own)) for own in (a, b, c) * 2]:
            each.result()
        assert 1 <= most <= 2
        wait_until(lambda: ask(a, tenant, quotas, Amounts()) == Levels(True, None, None, 0))


def test_a_dead_servers_sequences_end_with_its_last_sign(
    store: AdapterStore, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.database.write(changes_answers=False) as connection:
        taken = meter_rows.take(connection, "dead", 0, Take(tenant=tenant, quotas=SLOW, takes=Amounts(sequences=2)))
        assert taken is not None
    with meters(store) as own:
        assert not is_given(own, tenant, SLOW)
        with store.database.write(changes_answers=False) as connection:
            ago = f"jsonb_set(running, '{{dead,1}}', to_jsonb((running->'dead'->>1)::float8 - {meter_rows.LIFE_S}))"
            connection.execute(text(f"UPDATE tenant_meters SET running = {ago} WHERE running ? 'dead'"))
        assert is_given(own, tenant, SLOW)


def test_a_living_servers_sequences_count_for_longer_than_its_last_call(
    store: AdapterStore, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.accounts.shared_meters._BEAT_S", 0.05)
    with meters(store) as a, meters(store) as b:
        assert is_given(a, tenant, SLOW, Amounts(sequences=2))
        first = written_s(store, tenant)
        wait_until(lambda: written_s(store, tenant) > first)
        assert not is_given(b, tenant, SLOW)


def written_s(store: AdapterStore, tenant: str) -> float:
    query = "SELECT max((value->>1)::float8) FROM tenant_meters, jsonb_each(running) WHERE tenant_id = "
    with store.database.read() as connection:
        found = connection.execute(text(query + "(SELECT id FROM tenants WHERE name = :name)"), {"name": tenant})
        return float(found.scalar_one())


def test_a_database_that_is_away_gives_no_answer_and_its_return_counts_again(
    store: AdapterStore, tenant: str, server: postgres.PostgresServer
) -> None:
    """Its crash empties the unlogged row: the sequences that still run are written again."""
    with meters(store) as a, meters(store) as b:
        assert is_given(a, tenant, SLOW, Amounts(sequences=2))
        server.stop()
        wait_until(lambda: ask(a, tenant, SLOW) is None)
        assert ask(b, tenant, SLOW) is None
        server.start()
        wait_until(lambda: a.is_connected and b.is_connected)
        assert not is_given(b, tenant, SLOW)
        assert not is_given(a, tenant, SLOW)


def test_a_quota_that_changes_counts_from_the_next_call(store: AdapterStore, tenant: str) -> None:
    with meters(store) as own:
        for limit, more in ((2, 2), (5, 3), (4, 0)):
            quotas = Quotas(requests_per_minute=limit)
            assert sum(is_given(own, tenant, quotas) for _ in range(limit + 1)) == more
        assert is_given(own, tenant, Quotas(tokens_per_minute=100), Amounts(tokens=100))
        assert is_given(own, tenant, Quotas(requests_per_minute=4), ONE), "a quota that is set again is full"


def test_an_unknown_tenant_has_no_levels(store: AdapterStore) -> None:
    with meters(store) as own:
        assert ask(own, "nobody", SLOW) is None


def test_a_call_is_one_statement(store: AdapterStore, tenant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it costs, printed."""
    monkeypatch.setattr("adapters_store.accounts.shared_meters._BEAT_S", 3600.0)
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "tenant_meters" in statement:
            statements.append(statement)

    quotas = Quotas(requests_per_minute=10**9, tokens_per_minute=10**12, max_concurrent=10**6)
    num_calls = 2000 if IS_LONG else 100
    with meters(store) as own:
        assert is_given(own, tenant, quotas)
        event.listen(Engine, "before_cursor_execute", note)
        try:
            took_ms = [1000 * timed(partial(is_given, own, tenant, quotas)) for _ in range(num_calls)]
        finally:
            event.remove(Engine, "before_cursor_execute", note)
    print(f"a call: p50 {median(took_ms):.2f} ms, p99 {quantiles(took_ms, n=100)[98]:.2f} ms")
    assert len(statements) == num_calls


def timed(call: Callable[[], bool]) -> float:
    start_s = time.perf_counter()
    assert call()
    return time.perf_counter() - start_s
