"""A data directory and a database prove that they belong together; a wrong pair is refused and nothing is removed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from adapters_store.errors import StoreError, StoreUnavailable
from adapters_store.storage.database import adopt
from adapters_store.store import AdapterStore
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base, write
from support.servers import postgres
from support.servers.old_store import make_old
from support.servers.racing import race

BASE = tiny_base()
TWO_HOURS = 7200


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.PostgresServer]:
    with postgres.server() as server:
        yield server


@pytest.fixture
def url(server: postgres.PostgresServer, request: pytest.FixtureRequest) -> str:
    """An empty database."""
    return server.database(f"{request.node.name[:40]}-{time.monotonic_ns()}")


def fill(data_dir: Path, url: str | None, *, seed: int = 0) -> AdapterStore:
    """One tenant with one adapter."""
    store = AdapterStore.open(data_dir, database_url=url)
    store.tenants.create(f"acme{seed}")
    publish(store, data_dir, f"acme{seed}", seed)
    return store


def publish(store: AdapterStore, folder: Path, tenant: str, seed: int) -> None:
    weights = write(folder.parent / f"upload-{folder.name}", safetensors_bytes(lora_tensors(BASE, seed=seed)))
    store.publish(tenant=tenant, name="law", config=config_bytes(), weights=weights, base=BASE)


def filled(data_dir: Path, url: str | None, *, seed: int = 0) -> None:
    fill(data_dir, url, seed=seed).close()


def blobs(data_dir: Path) -> set[str]:
    return {folder.name for folder in (data_dir / "blobs").glob("??/*")}


def make_old_files(data_dir: Path) -> None:
    """All of it two hours old: beyond every grace."""
    then = time.time() - TWO_HOURS
    for path in [*data_dir.rglob("*")]:
        os.utime(path, (then, then))


def refused(data_dir: Path, url: str | None) -> str:
    with pytest.raises(StoreError) as caught:
        AdapterStore.open(data_dir, database_url=url)
    assert caught.value.code == "wrong_store"
    return caught.value.message


def test_a_start_without_the_databases_url_is_refused_and_removes_nothing(data_dir: Path, url: str) -> None:
    """The sweep of that start took every blob older than an hour."""
    filled(data_dir, url)
    make_old_files(data_dir)
    before = blobs(data_dir)
    assert "MULTILORA_DATABASE_URL" in refused(data_dir, None)
    assert not (data_dir / "multilora.db").exists()
    assert blobs(data_dir) == before != set()
    again = AdapterStore.open(data_dir, database_url=url)
    assert again.sweep().blobs == []
    again.load_packed(again.list_versions()[0].digest, BASE)
    again.close()


def test_a_database_of_another_directory_is_refused_both_ways(
    tmp_path: Path, server: postgres.PostgresServer, url: str
) -> None:
    other = server.database(f"other-{time.monotonic_ns()}")
    filled(tmp_path / "a", url)
    filled(tmp_path / "b", other, seed=1)
    for data_dir, wrong in ((tmp_path / "a", other), (tmp_path / "b", url), (tmp_path / "a", None)):
        refused(data_dir, wrong)
    filled(tmp_path / "sqlite", None, seed=2)
    refused(tmp_path / "sqlite", url)


def test_a_second_servers_own_empty_directory_is_refused(tmp_path: Path, url: str) -> None:
    """It would put every adapter of the first into quarantine."""
    filled(tmp_path / "a", url)
    assert "another data directory" in refused(tmp_path / "b", url)
    store = AdapterStore.open(tmp_path / "a", database_url=url)
    assert store.check_integrity().quarantined == []
    store.close()


def test_two_first_starts_at_once_make_one_pair(tmp_path: Path, server: postgres.PostgresServer) -> None:
    """With a directory each one is refused; with one directory both are in. Nobody sees a half-made table."""
    for number in range(6):
        shared = bool(number % 2)
        url = server.database(f"race{number}-{time.monotonic_ns()}")
        dirs = [tmp_path / str(number) / ("x" if shared else str(each)) for each in range(2)]
        outcomes = race([partial(opened, each, url) for each in dirs])
        codes = sorted(getattr(outcome, "code", str(outcome)) for outcome in outcomes)
        assert codes == (["None", "None"] if shared else ["None", "wrong_store"])


def opened(data_dir: Path, url: str) -> None:
    AdapterStore.open(data_dir, database_url=url).close()


@pytest.mark.parametrize("on_postgres", [False, True])
def test_a_store_from_before_there_were_ids_is_taken_over(data_dir: Path, url: str, on_postgres: bool) -> None:
    own = url if on_postgres else None
    filled(data_dir, own)
    make_old(data_dir, own)
    make_old_files(data_dir)
    for _ in range(2):
        store = AdapterStore.open(data_dir, database_url=own)
        assert [version.ref for version in store.list_versions()] == ["law@1"]
        assert store.sweep().blobs == []
        store.close()


def test_what_lay_in_an_old_directory_without_a_row_is_kept_and_what_comes_later_is_swept(data_dir: Path) -> None:
    """Nothing proves whose the old ones are; a killed upload of now is ours."""
    filled(data_dir, None)
    make_old(data_dir)
    for name in ("a", "b"):
        (data_dir / "blobs" / (name * 2) / (name * 64)).mkdir(parents=True)
    make_old_files(data_dir)
    store = AdapterStore.open(data_dir)
    later = data_dir / "blobs" / "bb" / ("b" * 64)
    os.utime(later, (time.time() + 5, time.time() + 5))
    assert store.sweep(grace_s=-60).blobs == [f"sha256:{'b' * 64}"]
    assert "a" * 64 in blobs(data_dir)
    store.close()


def test_an_old_directory_is_refused_to_a_database_that_knows_nothing_of_it(
    data_dir: Path, tmp_path: Path, url: str
) -> None:
    """The first start after an upgrade is the one without the URL."""
    filled(data_dir, url)
    make_old(data_dir, url)
    before = blobs(data_dir)
    assert "knows none of them" in refused(data_dir, None)
    assert "holds none of them" in refused(tmp_path / "empty", url)
    assert blobs(data_dir) == before
    AdapterStore.open(data_dir, database_url=url).close()


def test_a_start_that_was_killed_between_the_two_marks_is_gone_on_with(data_dir: Path) -> None:
    AdapterStore.open(data_dir).close()
    make_old(data_dir)
    (data_dir / "store.json").write_text(json.dumps({"store_id": "x", "is_joined": False, "adopted_at": 0}))
    store = AdapterStore.open(data_dir)
    assert store.database.pair.store_id not in ("", "x")
    store.close()
    mark = json.loads((data_dir / "store.json").read_text())
    (data_dir / "store.json").write_text(json.dumps({**mark, "is_joined": False}))
    AdapterStore.open(data_dir).close()
    assert json.loads((data_dir / "store.json").read_text()) == mark


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"store_id": "x", "more": 1}', '{"store_id": "x", "adopted_at": "?"}']
)
def test_a_damaged_mark_is_refused(data_dir: Path, content: str) -> None:
    AdapterStore.open(data_dir).close()
    (data_dir / "store.json").write_text(content)
    refused(data_dir, None)


def test_adopt_joins_what_the_operator_says_and_keeps_all_that_lies_there(data_dir: Path, url: str) -> None:
    filled(data_dir, url)
    make_old_files(data_dir)
    before = blobs(data_dir)
    adopt(data_dir, None)
    store = AdapterStore.open(data_dir)
    assert store.sweep(grace_s=-1).blobs == []
    assert blobs(data_dir) == before
    store.close()
    refused(data_dir, url)
    adopt(data_dir, url)
    store = AdapterStore.open(data_dir, database_url=url)
    store.load_packed(store.list_versions()[0].digest, BASE)
    store.close()


def test_a_database_that_changes_under_a_running_process_makes_no_sweep(data_dir: Path, url: str) -> None:
    """A failover to an empty copy, a restored dump of another store: the rows are not those of this directory."""
    store = fill(data_dir, url)
    make_old_files(data_dir)
    before = blobs(data_dir)
    with store.database.engine.begin() as connection:
        connection.execute(text("DELETE FROM adapters"))
        connection.execute(text("UPDATE store_state SET store_id = 'another'"))
    for sweeping in (store.sweep, lambda: store.tenants.delete("acme0")):
        with pytest.raises(StoreError) as caught:
            sweeping()
        assert caught.value.code == "wrong_store"
    assert blobs(data_dir) == before
    store.close()


@pytest.mark.parametrize("comes_back", ["empty", "another"])
def test_a_directory_that_went_away_takes_no_writes_until_it_is_back(
    data_dir: Path, tmp_path: Path, url: str, comes_back: str
) -> None:
    """An unmounted disk leaves an empty folder behind, which upload and database would fill."""
    store = fill(data_dir, url)
    data_dir.rename(tmp_path / "away")
    if comes_back == "empty":
        data_dir.mkdir()
    else:
        filled(data_dir, None, seed=1)
    for change in (lambda: store.tenants.create("x"), lambda: publish(store, data_dir, "acme0", 3), store.sweep):
        with pytest.raises(StoreUnavailable) as caught:
            change()
        assert caught.value.code == "data_dir_gone"
    shutil.rmtree(data_dir)
    (tmp_path / "away").rename(data_dir)
    wait_for(lambda: store.tenants.create("x"))
    store.close()


def wait_for(action: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + 30
    while True:
        try:
            action()
        except StoreUnavailable:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        else:
            return


def test_sqlites_file_may_not_be_replaced_under_a_running_process(data_dir: Path) -> None:
    """What was written went to a file that no longer has a name."""
    store = fill(data_dir, None)
    copy = data_dir / "copy"
    shutil.copy(data_dir / "multilora.db", copy)
    copy.replace(data_dir / "multilora.db")
    with pytest.raises(StoreUnavailable) as caught:
        store.tenants.create("x")
    assert caught.value.code == "data_dir_gone"
    store.close()
