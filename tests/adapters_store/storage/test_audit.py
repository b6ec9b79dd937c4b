"""Every change has its row, in the change's own transaction; rows are never altered, and there are never too many."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from adapters_store.accounts.keys import KeySpec, Scope
from adapters_store.errors import NotFound
from adapters_store.storage import audit
from adapters_store.storage.audit import Actor, act_as
from adapters_store.store import AdapterStore
from adapters_store.versions.records import AdapterVersion

Publish = Callable[..., AdapterVersion]


def actions(store: AdapterStore) -> list[str]:
    """What was done, the first first."""
    return [entry.action for entry in reversed(store.audit.entries())]


def test_whatever_is_done_to_tenants_keys_and_adapters_is_written_down(store: AdapterStore, publish: Publish) -> None:
    first = publish("law", seed=1)
    publish("law", seed=2)
    store.aliases.activate("acme", "law", 1)
    store.delete("acme", "law@2")
    made = store.tenants.create_key("acme", KeySpec(scopes=frozenset({Scope.READ})))
    store.tenants.rotate_key("acme", 60, made.key_id)
    store.tenants.revoke_key("acme", made.key_id)
    store.tenants.set_disabled("acme", True)
    store.tenants.set_disabled("acme", False)
    store.tenants.delete("acme")
    assert actions(store) == [
        "tenant.create",
        "adapter.upload",
        "adapter.upload",
        "adapter.activate",
        "adapter.delete",
        "key.create",
        "key.rotate",
        "key.revoke",
        "tenant.disable",
        "tenant.enable",
        "tenant.delete",
    ]
    entries = store.audit.entries(tenant="acme")
    assert len(entries) == 11
    uploaded = entries[-2]
    assert (uploaded.target, uploaded.detail) == ("law@1", {"digest": first.digest, "active": True})
    assert entries[5].detail == {"key_id": made.key_id, "scopes": ["read"], "expires_at": None}


def test_no_key_stands_in_the_log(store: AdapterStore) -> None:
    keys = [store.tenants.create("law").api_key, store.tenants.rotate_key("law").api_key]
    shown = repr(store.audit.entries())
    assert not any(key in shown for key in keys)


def test_who_acts_is_known_on_the_threads_that_act_for_them(store: AdapterStore) -> None:
    def create(name: str) -> None:
        act_as(Actor(f"key:{name}", f"req_{name}"))
        thread = threading.Thread(target=copy_context().run, args=(store.tenants.create, name))
        thread.start()
        thread.join()

    for name in ("a", "b"):
        copy_context().run(create, name)
    store.tenants.create("c")
    newest = store.audit.entries(limit=3)
    assert [(entry.actor, entry.request_id) for entry in newest] == [
        ("process", None),
        ("key:b", "req_b"),
        ("key:a", "req_a"),
    ]


def test_what_was_not_done_is_not_written_down(store: AdapterStore, publish: Publish) -> None:
    before = actions(store)
    with pytest.raises(NotFound):
        store.aliases.activate("acme", "nothing", 1)
    with pytest.raises(NotFound):
        store.delete("acme", "nothing")
    with pytest.raises(NotFound):
        store.tenants.revoke_key("acme", 99)
    assert actions(store) == before


@pytest.mark.parametrize("change", ["UPDATE audit_log SET actor = 'nobody'", "UPDATE audit_log SET detail = '{}'"])
def test_a_row_is_never_altered(store: AdapterStore, change: str) -> None:
    with pytest.raises(DatabaseError, match="append-only"), store.database.write() as connection:
        connection.execute(text(change))
    assert store.audit.entries()[0].actor == "process"


def test_the_oldest_rows_beyond_the_bound_go(store: AdapterStore) -> None:
    with store.database.write() as connection:
        for index in range(30):
            audit.note(connection, "test", target=str(index), max_rows=10)
    assert [entry.target for entry in store.audit.entries()] == [str(index) for index in range(29, 19, -1)]


def test_rows_older_than_the_retention_go(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "now_s", lambda: 1000)
    store.audit.record("long ago")
    monkeypatch.undo()
    store.audit.record("now")
    assert store.audit.prune() == 1
    assert actions(store) == ["tenant.create", "now"]


def test_a_page_goes_on_where_the_last_one_ended(store: AdapterStore) -> None:
    for index in range(7):
        store.audit.record("step", target=str(index))
    first = store.audit.entries(limit=3)
    rest = store.audit.entries(before=first[-1].id)
    assert [entry.target for entry in (*first, *rest)] == [*"6543210", None]
