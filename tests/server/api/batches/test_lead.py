"""Of several servers on one store, one answers the batches of a base; the next one does when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.store import AdapterStore
from server.api.batches.lead import Lead
from support.servers import postgres
from support.servers.waiting import wait_until


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AdapterStore]:
    if request.param == "sqlite":
        store = AdapterStore.open(tmp_path)
        yield store
        store.close()
        return
    with postgres.server() as server:
        store = AdapterStore.open(tmp_path, database_url=server.url)
        yield store
        store.close()


def test_one_server_leads_and_the_next_one_does_when_it_ends(store: AdapterStore, tmp_path: Path) -> None:
    first, second, other_base = (Lead(store.database, tmp_path, base) for base in ("sha256:a", "sha256:a", "sha256:b"))
    assert [first.holds(), second.holds(), other_base.holds()] == [True, False, True]
    assert [first.holds(), second.holds()] == [True, False]
    first.close()
    wait_until(second.holds)  # PostgreSQL frees the lock once it sees that the connection has ended
    assert not first.holds()
    for each in (first, second, other_base):
        each.close()
