"""What a bare name means: canaries by user, promote, rollback, unload; and what holds through any order of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from adapters_store.base.description import BaseDescription
from adapters_store.errors import Conflict, NotFound
from adapters_store.store import AdapterStore
from adapters_store.versions.alias_rows import MAX_HISTORY
from adapters_store.versions.records import AdapterVersion

Publish = Callable[..., AdapterVersion]
USERS = [f"user-{index}" for index in range(2000)]


@pytest.fixture
def three(publish: Publish) -> list[AdapterVersion]:
    """law@1 .. law@3; the third is active."""
    return [publish(seed=seed) for seed in (1, 2, 3)]


def answers(store: AdapterStore) -> dict[str, int]:
    """Version number by user."""
    return {user: store.resolve("acme", "law", user).version for user in USERS}


def active(store: AdapterStore) -> int:
    return store.resolve("acme", "law").version


def test_a_canary_gets_its_share_of_users_and_nobody_moves_when_asked_again(
    store: AdapterStore, three: list[AdapterVersion]
) -> None:
    store.aliases.set_canary("acme", "law", 1, 10)
    first = answers(store)
    assert first == answers(store)
    counts = Counter(first.values())
    assert counts.keys() == {1, 3}
    assert 0.08 < counts[1] / len(USERS) < 0.12


def test_a_growing_canary_keeps_everybody_it_had(store: AdapterStore, three: list[AdapterVersion]) -> None:
    had: set[str] = set()
    for percent in (1, 5, 25, 50, 99):
        store.aliases.set_canary("acme", "law", 2, percent)
        have = {user for user, version in answers(store).items() if version == 2}
        assert had <= have
        had = have
    assert len(had) > 0.97 * len(USERS)


def test_users_are_drawn_anew_for_each_name(store: AdapterStore, publish: Publish) -> None:
    for name in ("law", "med"):
        publish(name, seed=1)
        publish(name, seed=2)
        store.aliases.set_canary("acme", name, 1, 50)
    same = sum(
        store.resolve("acme", "law", user).version == store.resolve("acme", "med", user).version for user in USERS
    )
    assert 0.4 < same / len(USERS) < 0.6


def test_without_a_user_the_active_version_answers(store: AdapterStore, three: list[AdapterVersion]) -> None:
    store.aliases.set_canary("acme", "law", 1, 99)
    assert store.resolve("acme", "law").version == 3
    assert store.resolve("acme", "law@2", USERS[0]).version == 2


def test_shares_are_shown_and_add_up_to_100(store: AdapterStore, three: list[AdapterVersion]) -> None:
    store.aliases.set_canary("acme", "law", 1, 10)
    store.aliases.set_canary("acme", "law", 2, 20)
    assert [version.percent for version in store.versions("acme", "law")] == [10, 20, 70]
    store.aliases.set_canary("acme", "law", 1, 0)
    assert [version.percent for version in store.versions("acme", "law")] == [0, 20, 80]


def test_promote_makes_the_canary_everybodys_version(store: AdapterStore, three: list[AdapterVersion]) -> None:
    store.aliases.set_canary("acme", "law", 2, 5)
    assert store.aliases.promote("acme", "law").version == 2
    assert set(answers(store).values()) == {2}


def test_rollback_first_ends_canaries_then_goes_back_step_by_step(
    store: AdapterStore, three: list[AdapterVersion]
) -> None:
    store.aliases.set_canary("acme", "law", 1, 50)
    assert store.aliases.roll_back("acme", "law").percent == 100
    assert [store.aliases.roll_back("acme", "law").version for _ in range(2)] == [2, 1]
    with pytest.raises(Conflict, match="active before") as caught:
        store.aliases.roll_back("acme", "law")
    assert caught.value.code == "nothing_before"
    assert active(store) == 1


def test_rollback_passes_over_what_is_gone(store: AdapterStore, three: list[AdapterVersion]) -> None:
    store.delete("acme", "law@2")
    assert store.aliases.roll_back("acme", "law").version == 1


def test_rollback_after_the_active_version_was_deleted_brings_the_name_back(
    store: AdapterStore, three: list[AdapterVersion]
) -> None:
    store.delete("acme", "law@3")
    with pytest.raises(NotFound):
        store.resolve("acme", "law")
    assert store.aliases.roll_back("acme", "law").version == 2
    assert active(store) == 2


def test_a_new_upload_ends_the_canaries(store: AdapterStore, publish: Publish, three: list[AdapterVersion]) -> None:
    store.aliases.set_canary("acme", "law", 1, 50)
    publish(seed=4)
    assert set(answers(store).values()) == {4}


@pytest.mark.parametrize(
    ("number", "percent", "code"), [(3, 10, "is_active"), (2, 60, "canary_too_large"), (9, 10, "model_not_found")]
)
def test_a_canary_that_cannot_be_is_refused(
    store: AdapterStore, three: list[AdapterVersion], number: int, percent: int, code: str
) -> None:
    store.aliases.set_canary("acme", "law", 1, 50)
    with pytest.raises((Conflict, NotFound)) as caught:
        store.aliases.set_canary("acme", "law", number, percent)
    assert caught.value.code == code
    assert [version.percent for version in store.versions("acme", "law")] == [50, 0, 50]


@pytest.mark.parametrize("percent", [-1, 100])
def test_a_share_out_of_range_is_refused(store: AdapterStore, three: list[AdapterVersion], percent: int) -> None:
    with pytest.raises(ValueError, match=f"percent must be 0..99, got {percent}"):
        store.aliases.set_canary("acme", "law", 1, percent)


def test_promote_without_one_clear_canary_is_refused(store: AdapterStore, three: list[AdapterVersion]) -> None:
    with pytest.raises(Conflict, match="there is none"):
        store.aliases.promote("acme", "law")
    store.aliases.set_canary("acme", "law", 1, 10)
    store.aliases.set_canary("acme", "law", 2, 10)
    with pytest.raises(Conflict, match="law@1, law@2"):
        store.aliases.promote("acme", "law")
    assert store.aliases.promote("acme", "law", 1).version == 1


def test_an_unloaded_name_answers_nobody_until_activated(store: AdapterStore, three: list[AdapterVersion]) -> None:
    gone = store.aliases.unload("acme", "law")
    assert set(gone) == {version.digest for version in three}
    for ref in ("law", "law@1", "law@3"):
        with pytest.raises(NotFound) as caught:
            store.resolve("acme", ref)
        assert caught.value.code == "adapter_unloaded"
    store.aliases.activate("acme", "law", 1)
    assert active(store) == 1
    assert [version.loaded for version in store.versions("acme", "law")] == [True, False, False]


def test_what_another_tenant_serves_stays_in_service(
    store: AdapterStore, publish: Publish, base: BaseDescription
) -> None:
    store.tenants.create("globex")
    mine, theirs = publish(seed=1), publish(seed=1, tenant="globex")
    assert mine.digest == theirs.digest
    assert store.aliases.unload("acme", "law") == []
    assert store.not_in_service([mine.digest]) == []
    assert store.resolve("globex", "law").digest == mine.digest
    assert store.load_packed(mine.digest, base).digest == mine.digest
    assert store.aliases.unload("globex", "law", 1) == [mine.digest]
    assert store.not_in_service([mine.digest]) == [mine.digest]


def test_an_unloaded_canary_gives_its_users_back(store: AdapterStore, three: list[AdapterVersion]) -> None:
    store.aliases.set_canary("acme", "law", 1, 50)
    store.aliases.unload("acme", "law", 1)
    assert set(answers(store).values()) == {3}
    with pytest.raises(NotFound) as caught:
        store.aliases.set_canary("acme", "law", 1, 50)
    assert caught.value.code == "adapter_unloaded"


def test_history_is_bounded(store: AdapterStore, three: list[AdapterVersion]) -> None:
    for step in range(2 * MAX_HISTORY):
        store.aliases.activate("acme", "law", 1 + step % 3)
    with store.database.read() as connection:
        count = connection.exec_driver_sql("SELECT count(*) FROM alias_history").scalar_one()
    assert count <= MAX_HISTORY


@pytest.mark.parametrize("verb", ["promote", "roll_back", "unload"])
def test_nobody_changes_what_is_not_theirs(store: AdapterStore, three: list[AdapterVersion], verb: str) -> None:
    store.tenants.create("globex")
    for tenant, name in (("globex", "law"), ("acme", "none")):
        with pytest.raises(NotFound) as caught:
            getattr(store.aliases, verb)(tenant, name)
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("seed", range(2))
def test_in_any_order_of_changes_a_name_answers_with_what_its_shares_say(
    store: AdapterStore, publish: Publish, seed: int
) -> None:
    """Random verbs, refused or not: shares add up to 100 or nobody is answered, and only who has a share answers."""
    rng = random.Random(seed)
    publish(seed=0)
    verbs: list[Callable[[int], object]] = [
        lambda number: publish(seed=rng.randrange(6)),
        lambda number: publish(seed=rng.randrange(6), activate=False),
        lambda number: store.aliases.activate("acme", "law", number),
        lambda number: store.aliases.set_canary("acme", "law", number, rng.choice((0, 10, 60))),
        lambda number: store.aliases.promote("acme", "law", rng.choice((None, number))),
        lambda number: store.aliases.roll_back("acme", "law"),
        lambda number: store.aliases.unload("acme", "law", number),
        lambda number: store.delete("acme", f"law@{number}"),
    ]
    num_refused = 0
    for _ in range(60):
        versions = store.versions("acme", "law")
        number = rng.choice(versions).version if versions else 1
        try:
            rng.choice(verbs)(number)
        except (Conflict, NotFound):
            num_refused += 1
        _check_shares(store)
    assert 0 < num_refused < 60


def _check_shares(store: AdapterStore) -> None:
    shares = {version.version: version.percent for version in store.versions("acme", "law") if version.percent}
    assert sum(shares.values()) in (0, 100)
    for user in USERS[:20]:
        try:
            assert store.resolve("acme", "law", user).version in shares
        except NotFound:
            assert not shares
