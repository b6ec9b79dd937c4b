"""`multilora tenant` on a real store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import support.servers.keys
from adapters_store.accounts.keys import KeySpec
from adapters_store.accounts.records import MAX_OVERLAP_S
from adapters_store.store import AdapterStore

Command = Callable[..., Any]


@pytest.fixture
def owner_of(data_dir: Path) -> Callable[[str], str | None]:
    """The tenant that a key opens, as a server would find it."""

    def find(key: str) -> str | None:
        store = AdapterStore.open(data_dir)
        try:
            return support.servers.keys.owner_of(store, key)
        finally:
            store.close()

    return find


def test_create_prints_exactly_the_tenant_and_its_key(run_json: Command, owner_of: Callable[[str], str | None]) -> None:
    created = run_json("tenant", "create", "acme")
    assert sorted(created) == ["api_key", "tenant"]
    assert created["tenant"] == "acme"
    assert owner_of(created["api_key"]) == "acme"


def test_create_shows_the_key_to_people(run: Command, owner_of: Callable[[str], str | None]) -> None:
    shown = run("tenant", "create", "acme").stdout
    key = next(line.split()[-1] for line in shown.splitlines() if line.startswith("api key"))
    assert owner_of(key) == "acme"


def test_a_tenant_is_created_once(run: Command) -> None:
    run("tenant", "create", "acme")
    again = run("tenant", "create", "acme")
    assert again.exit_code == 5
    assert again.stderr.startswith("tenant_exists: ")


def test_list_names_the_tenants_and_counts_their_adapters(
    run: Command, run_json: Command, base: Path, adapter: Path
) -> None:
    assert run_json("tenant", "list") == {"data": []}
    assert "no tenants yet" in run("tenant", "list").stdout
    for name in ("globex", "acme"):
        run("tenant", "create", name)
    run("adapter", "push", adapter, "--tenant", "acme", "--name", "law", "--base", base)
    data = run_json("tenant", "list")["data"]
    assert [(each["tenant"], each["adapters"]) for each in data] == [("acme", 1), ("globex", 0)]
    assert "globex" in run("tenant", "list").stdout


def test_rotating_gives_a_new_key_and_ends_the_old_one(
    run_json: Command, owner_of: Callable[[str], str | None]
) -> None:
    old = run_json("tenant", "create", "acme")["api_key"]
    new = run_json("tenant", "rotate-key", "acme")["api_key"]
    assert owner_of(new) == "acme"
    assert owner_of(old) is None


def test_an_old_key_may_open_a_little_longer(run_json: Command, owner_of: Callable[[str], str | None]) -> None:
    old = run_json("tenant", "create", "acme")["api_key"]
    run_json("tenant", "rotate-key", "acme", "--overlap-s", "60")
    assert owner_of(old) == "acme"


def test_an_overlap_is_as_long_as_the_api_allows(run: Command) -> None:
    run("tenant", "create", "acme")
    assert run("tenant", "rotate-key", "acme", "--overlap-s", str(MAX_OVERLAP_S)).exit_code == 0
    refused = run("tenant", "rotate-key", "acme", "--overlap-s", str(MAX_OVERLAP_S + 1))
    assert refused.exit_code == 2
    assert "--overlap-s" in refused.output
    assert str(MAX_OVERLAP_S) in refused.output


def test_one_key_rotates_while_the_others_stay(run_json: Command, owner_of: Callable[[str], str | None]) -> None:
    first = run_json("tenant", "create", "acme")["api_key"]
    second = run_json("tenant", "key", "create", "acme", "--scope", "read")["api_key"]
    key_id = run_json("tenant", "key", "list", "acme")["data"][1]["id"]
    third = run_json("tenant", "rotate-key", "acme", "--key", str(key_id))["api_key"]
    assert [owner_of(key) for key in (first, second, third)] == ["acme", None, "acme"]
    assert run_json("tenant", "key", "list", "acme")["data"][2]["scopes"] == ["read"]


def test_a_key_has_scopes_an_end_and_a_label(run: Command, run_json: Command) -> None:
    run("tenant", "create", "acme")
    made = run_json(
        "tenant", "key", "create", "acme", "--scope", "read", "--scope", "jobs", "--days", "1", "--label", "ci"
    )
    assert sorted(made) == ["api_key", "tenant"]
    listed = run_json("tenant", "key", "list", "acme")["data"][1]
    assert (listed["scopes"], listed["label"]) == (["jobs", "read"], "ci")
    assert listed["expires_at"] - listed["created"] in (86_400, 86_401, 86_399)
    shown = run("tenant", "key", "list", "acme").stdout
    assert "jobs read" in shown
    assert "never" in shown
    assert made["api_key"] not in shown
    refused = run("tenant", "key", "create", "acme", "--scope", "root")
    assert (refused.exit_code, refused.stderr[:10]) == (4, "bad_scope:")


def test_a_revoked_key_and_a_disabled_tenants_keys_open_nothing(
    run: Command, run_json: Command, owner_of: Callable[[str], str | None]
) -> None:
    first = run_json("tenant", "create", "acme")["api_key"]
    second = run_json("tenant", "key", "create", "acme")["api_key"]
    key_id = run_json("tenant", "key", "list", "acme")["data"][1]["id"]
    assert run("tenant", "key", "revoke", "acme", str(key_id)).exit_code == 0
    assert [owner_of(first), owner_of(second)] == ["acme", None]
    assert run_json("tenant", "disable", "acme") == {"tenant": "acme", "disabled": True}
    assert owner_of(first) is None
    assert "disabled" in run("tenant", "list").stdout
    assert run("tenant", "enable", "acme").stdout == "tenant acme is enabled\n"
    assert owner_of(first) == "acme"
    assert run("tenant", "key", "revoke", "acme", "999").exit_code == 3


def test_deleting_asks_first(run: Command, run_json: Command) -> None:
    run("tenant", "create", "acme")
    refused = run("tenant", "delete", "acme", stdin="n\n")
    assert refused.exit_code == 1
    assert "0 adapters" in refused.stdout
    assert len(run_json("tenant", "list")["data"]) == 1
    assert run("tenant", "delete", "acme", stdin="y\n").exit_code == 0
    assert run_json("tenant", "list") == {"data": []}


@pytest.mark.parametrize("sure", ["--yes", "--json"])
def test_deleting_does_not_ask_who_is_sure(run: Command, run_json: Command, sure: str) -> None:
    run("tenant", "create", "acme")
    assert run("tenant", "delete", "acme", sure).exit_code == 0
    assert run_json("tenant", "list") == {"data": []}


def test_deleting_a_tenant_takes_its_adapters(run: Command, run_json: Command, base: Path, adapter: Path) -> None:
    run("tenant", "create", "acme")
    digest = run_json("adapter", "push", adapter, "--tenant", "acme", "--name", "law", "--base", base)["digest"]
    assert run_json("tenant", "delete", "acme") == {"tenant": "acme", "deleted": True, "digests": [digest]}
    assert run_json("adapter", "list") == {"data": []}


def test_deleting_nobody_exits_3_without_asking(run: Command) -> None:
    assert run("tenant", "delete", "nobody").exit_code == 3


def test_quotas_are_shown_changed_one_by_one_and_taken_away(run_json: Command) -> None:
    run_json("tenant", "create", "acme")
    first = run_json("tenant", "quota", "acme", "--requests-per-minute", "60", "--weight", "2")
    assert (first["requests_per_minute"], first["weight"], first["max_adapters"]) == (60, 2.0, None)
    second = run_json("tenant", "quota", "acme", "--max-adapters", "5")
    assert (second["requests_per_minute"], second["max_adapters"]) == (60, 5)
    assert run_json("tenant", "quota", "acme") == second
    third = run_json("tenant", "quota", "acme", "--unlimited", "--max-concurrent", "8")
    assert (third["requests_per_minute"], third["weight"], third["max_concurrent"]) == (None, 1.0, 8)


def test_quotas_of_nobody_are_an_error(run: Command) -> None:
    assert run("tenant", "quota", "nobody").stderr.startswith("tenant_not_found: ")


@pytest.mark.parametrize("option", ["nan", "inf", "1e9"])
def test_a_key_ends_within_a_century(run: Command, option: str) -> None:
    run("tenant", "create", "acme")
    refused = run("tenant", "key", "create", "acme", "--days", option)
    assert refused.exit_code == 2
    assert "--days" in refused.stderr


def test_a_key_whose_end_no_calendar_holds_is_listed(run: Command, run_json: Command, data_dir: Path) -> None:
    """The HTTP route takes any whole number of seconds that JSON holds."""
    run("tenant", "create", "acme")
    store = AdapterStore.open(data_dir)
    store.tenants.create_key("acme", KeySpec(expires_at=2**53))
    store.close()
    assert "after 9998" in run("tenant", "key", "list", "acme").stdout
    assert run_json("tenant", "key", "list", "acme")["data"][1]["expires_at"] == 2**53
