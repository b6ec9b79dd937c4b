"""`multilora adapter import` on a real store, from a real object store and from a hub cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters_store.base.files import describe_base
from adapters_store.store import AdapterStore
from support.servers import object_store

Command = Callable[..., Any]
PLACE = "s3://models/store"


@pytest.fixture(scope="module")
def objects() -> Iterator[object_store.ObjectStore]:
    with object_store.in_environment("models") as store:
        yield store


@pytest.fixture
def bring(run: Command, data_dir: Path, base: Path) -> Command:
    """bring(name, source, *options): the result; acme is a tenant, and the base was served once."""
    store = AdapterStore.open(data_dir)
    store.remember_base(describe_base(base, name="served"))
    store.tenants.create("acme")
    store.close()
    return lambda name, source, *options: run(
        "adapter", "import", name, "--source", source, "--tenant", "acme", *options
    )


def put(objects: object_store.ObjectStore, place: str, folder: Path) -> str:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        objects.write(PLACE, f"{place}/{name}", (folder / name).read_bytes())
    return f"{PLACE}/{place}"


def test_an_import_is_the_version_that_a_push_would_make(
    objects: object_store.ObjectStore, bring: Command, run_json: Command, adapter: Path, data_dir: Path
) -> None:
    pushed = run_json("adapter", "push", adapter, "--tenant", "acme", "--name", "law")
    for name, source in (("bucket", put(objects, "law", adapter)), ("folder", str(adapter))):
        assert bring(name, source).exit_code == 0
        made = run_json("adapter", "show", name, "--tenant", "acme")
        assert (made["id"], made["digest"], made["active"]) == (f"{name}@1", pushed["digest"], True)
    assert not list(data_dir.glob("import-*"))


def test_links_of_a_hub_cache_are_followed(bring: Command, run_json: Command, adapter: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (snapshot / name).symlink_to(adapter / name)
    assert bring("linked", str(snapshot), "--no-activate").exit_code == 0
    assert run_json("adapter", "show", "linked@1", "--tenant", "acme")["active"] is False


def test_refusals_name_what_is_wrong_and_leave_nothing(
    objects: object_store.ObjectStore, bring: Command, run_json: Command, adapter: Path, data_dir: Path
) -> None:
    law = put(objects, "law", adapter)
    refused = {
        "source_not_found": bring("x", f"{PLACE}/none"),
        "source_not_allowed": bring("x", "http://169.254.169.254/latest"),
        "too_large": bring("x", law, "--max-adapter-bytes", "100"),
        "name_is_base": bring("served", law),
        "bad_name": bring("a b", law),
    }
    for code, result in refused.items():
        assert result.exit_code != 0
        assert code in result.output, (code, result.output)
    assert run_json("adapter", "list")["data"] == []
    assert not list(data_dir.glob("import-*"))
