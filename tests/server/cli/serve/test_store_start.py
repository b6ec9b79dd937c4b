"""What a server does to its store before it serves, on a disk that takes it and on one that does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from adapters_store.errors import StoreError
from adapters_store.store import AdapterStore
from server.cli.common.output import Output
from server.cli.serve.store_start import prepare, where_the_disk_allows
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes, tiny_base, write

BASE = tiny_base()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    store = AdapterStore.open(tmp_path / "data")
    store.tenants.create("acme")
    for seed in range(25):
        weights = write(tmp_path / "upload", safetensors_bytes(lora_tensors(BASE, seed=seed)))
        store.publish(tenant="acme", name=f"a{seed}", config=config_bytes(), weights=weights, base=BASE)
    yield store
    store.close()


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[dict[str, Any]]]:
    return lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_what_is_not_served_is_told_but_not_without_end(
    store: AdapterStore, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in store.list_versions()[:23]:
        shutil.rmtree(store.weights_of(version.digest).parent)
    prepare(store, Output())
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("not served: sha256:") for line in lines) == 20
    assert lines[-1] == "and 3 more: multilora quarantine list"


def test_a_whole_store_is_looked_over_in_a_moment(
    store: AdapterStore, told: Callable[[], list[dict[str, Any]]]
) -> None:
    prepare(store, Output(as_json=True, with_events=True))
    [checked] = told()
    assert (checked["event"], checked["blobs"], checked["num_quarantined"]) == ("store_checked", 25, 0)
    assert checked["duration_s"] < 1.0


def test_a_disk_that_takes_no_more_is_told_and_no_reason_not_to_serve(
    store: AdapterStore, told: Callable[[], list[dict[str, Any]]]
) -> None:
    def forbid(connection: Any, *_: object) -> None:
        connection.execute("PRAGMA query_only = ON")

    event.listen(store.database.engine, "checkout", forbid)
    shutil.rmtree(store.weights_of(store.list_versions()[0].digest).parent)
    output = Output(as_json=True, with_events=True)
    prepare(store, output)
    where_the_disk_allows(lambda: store.remember_base(BASE), output)
    warnings = told()
    assert [(each["event"], each["code"]) for each in warnings] == [("warning", "read_only")] * 3
    assert store.resolve("acme", "a5").name == "a5"


def test_any_other_fault_is_not_hidden(store: AdapterStore) -> None:
    def fail() -> None:
        raise StoreError("other", "other")

    with pytest.raises(StoreError):
        where_the_disk_allows(fail, Output())
