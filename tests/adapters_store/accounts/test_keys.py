"""What a key opens, until when, and that one key of a tenant's is not the others."""

from __future__ import annotations

import time

import pytest

from adapters_store.accounts import tenants
from adapters_store.accounts.keys import ALL_SCOPES, KeySpec, Scope, parse_scopes
from adapters_store.errors import InputRefused, NotFound
from adapters_store.store import AdapterStore
from support.servers.keys import owner_of

READ = frozenset({Scope.READ})


def test_a_tenants_first_key_opens_everything_and_a_later_one_what_it_was_made_for(store: AdapterStore) -> None:
    first = store.tenants.create("law")
    reader = store.tenants.create_key("law", KeySpec(scopes=READ, label="dashboard"))
    grants = [store.tenants.authenticate(made.api_key) for made in (first, reader)]
    assert [grant and (grant.tenant, grant.scopes) for grant in grants] == [("law", ALL_SCOPES), ("law", READ)]
    listed = store.tenants.keys("law")
    assert [(key.key_id, key.label, key.scopes) for key in listed] == [
        (first.key_id, None, ALL_SCOPES),
        (reader.key_id, "dashboard", READ),
    ]


def test_a_key_ends_when_it_was_made_to(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key = store.tenants.create_key("acme", KeySpec(expires_at=int(time.time()) + 60)).api_key
    assert owner_of(store, key) == "acme"
    later = time.time() + 61
    monkeypatch.setattr(tenants.time, "time", lambda: later)
    assert owner_of(store, key) is None


def test_a_revoked_key_opens_nothing_and_the_others_still_do(store: AdapterStore) -> None:
    one, two = (store.tenants.create_key("acme", KeySpec()) for _ in range(2))
    store.tenants.revoke_key("acme", one.key_id)
    assert [owner_of(store, made.api_key) for made in (one, two)] == [None, "acme"]


def test_rotating_one_key_keeps_its_scopes_and_the_other_keys(store: AdapterStore) -> None:
    other = store.tenants.create_key("acme", KeySpec())
    reader = store.tenants.create_key("acme", KeySpec(scopes=READ, label="dashboard"))
    new = store.tenants.rotate_key("acme", key_id=reader.key_id)
    grant = store.tenants.authenticate(new.api_key)
    assert grant is not None
    assert grant.scopes == READ
    assert [owner_of(store, made.api_key) for made in (other, reader)] == ["acme", None]


def test_a_key_that_has_ended_is_not_rotated_into_one_that_opens_nothing(store: AdapterStore) -> None:
    reader = store.tenants.create_key("acme", KeySpec(scopes=READ))
    store.tenants.revoke_key("acme", reader.key_id)
    with pytest.raises(InputRefused) as caught:
        store.tenants.rotate_key("acme", key_id=reader.key_id)
    assert caught.value.code == "bad_expiry"
    assert len(store.tenants.keys("acme")) == 2


def test_rotating_a_tenants_keys_ends_all_of_them(store: AdapterStore) -> None:
    made = [store.tenants.create("law"), store.tenants.create_key("law", KeySpec(scopes=READ))]
    new = store.tenants.rotate_key("law", overlap_s=0)
    assert [owner_of(store, each.api_key) for each in (*made, new)] == [None, None, "law"]


def test_a_key_is_reached_through_its_own_tenant_only(store: AdapterStore) -> None:
    store.tenants.create("law")
    made = store.tenants.create_key("acme", KeySpec())
    for attempt in (store.tenants.revoke_key, lambda name, key_id: store.tenants.rotate_key(name, 0, key_id)):
        with pytest.raises(NotFound) as caught:
            attempt("law", made.key_id)
        assert caught.value.code == "key_not_found"
    assert owner_of(store, made.api_key) == "acme"


@pytest.mark.parametrize(
    ("new", "code"),
    [
        (KeySpec(expires_at=1), "bad_expiry"),
        (KeySpec(label="x" * 129), "bad_label"),
        (KeySpec(label="two\nlines"), "bad_label"),
    ],
)
def test_a_new_key_that_makes_no_sense_is_refused(store: AdapterStore, new: KeySpec, code: str) -> None:
    with pytest.raises(InputRefused) as caught:
        store.tenants.create_key("acme", new)
    assert caught.value.code == code


@pytest.mark.parametrize("names", [[], ["admin"], ["read", "*"], [""]])
def test_a_scope_there_is_not_is_refused(names: list[str]) -> None:
    with pytest.raises(InputRefused) as caught:
        parse_scopes(names)
    assert caught.value.code == "bad_scope"
    assert "inference" in caught.value.message
