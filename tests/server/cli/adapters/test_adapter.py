"""`multilora adapter` on a real store, without a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from safetensors.torch import load_file, save_file

from adapters_store.base.description import BaseDescription
from adapters_store.base.files import describe_base
from adapters_store.packed.layout import PackedAdapter
from adapters_store.store import AdapterStore
from server.cli.adapters.publishing import int8_change_on
from server.cli.common.failures import CommandError

Command = Callable[..., Any]
INT8 = ("--adapter-dtype", "int8")


@pytest.fixture
def known_base(data_dir: Path, base: Path) -> BaseDescription:
    """The base, served once from the data directory, in which there is a tenant "acme"."""
    description = describe_base(base, dtype="bfloat16", name="served")
    store = AdapterStore.open(data_dir)
    store.remember_base(description)
    store.tenants.create("acme")
    store.close()
    return description


@pytest.fixture
def push(run_json: Command, known_base: BaseDescription, adapter: Path) -> Command:
    """push(name, *options): the published version."""
    return lambda name, *options, folder=adapter: run_json(
        "adapter", "push", folder, "--tenant", "acme", "--name", name, *options
    )


def test_push_takes_the_base_that_was_served_last(push: Command, known_base: BaseDescription) -> None:
    pushed = push("law")
    assert pushed["id"] == "law@1"
    assert pushed["base"] == known_base.digest
    assert pushed["rank"] == 4
    assert pushed["target_modules"] == ["q_proj", "v_proj"]
    assert pushed["active"] is True


def test_push_takes_the_base_it_is_given(run: Command, run_json: Command, base: Path, adapter: Path) -> None:
    run("tenant", "create", "acme")
    pushed = run_json("adapter", "push", adapter, "--tenant", "acme", "--name", "law", "--base", base)
    assert pushed["base"] == describe_base(base).digest


def test_a_base_named_again_keeps_the_type_it_is_served_in(push: Command, base: Path) -> None:
    """Served in bfloat16, an adapter takes half of what it takes in the base's own float32."""
    assert push("law", "--base", base)["bytes"] == push("law")["bytes"]


def test_push_in_int8_measures_on_the_base_and_halves_the_bytes(
    push: Command, run: Command, base: Path, adapter: Path, known_base: BaseDescription, tmp_path: Path
) -> None:
    refused = push("law", "--base", base, *INT8)
    assert refused["error"]["code"] == "int8_changes_too_much", "noise, ten times what a trained adapter has"
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: values * 0.1 for name, values in tensors.items()}, tmp_path / "adapter_model.safetensors")
    plain, small = (push("law", "--base", base, *options, folder=tmp_path) for options in ((), INT8))
    assert (small["id"], small["digest"] == plain["digest"]) == ("law@2", False)
    assert plain["bytes"] > small["bytes"]
    assert [each["adapter_dtype"] for each in (plain, small)] == [None, "int8"]
    for ref, dtype in (("law@1", "the base's"), ("law@2", "int8")):
        assert f"dtype    {dtype}\n" in run("adapter", "show", ref, "--tenant", "acme").output
    assert run("adapter", "list").output.count("int8") == 1
    refused = run("adapter", "push", adapter, "--tenant", "acme", "--name", "law", "--adapter-dtype", "int4")
    assert "adapter_dtype: must be int8 or absent, got 'int4'" in refused.output
    with pytest.raises(CommandError, match="name its folder with --base"):
        int8_change_on(replace(known_base, folder=None))(*[cast(PackedAdapter, None)] * 2)


def test_push_without_any_base_says_what_to_do(run: Command, adapter: Path) -> None:
    run("tenant", "create", "acme")
    result = run("adapter", "push", adapter, "--tenant", "acme", "--name", "law")
    assert result.exit_code == 3
    assert result.stderr.startswith("unknown_base: ")
    assert "--base PATH" in result.stderr


def test_push_tells_people_what_was_published(run: Command, known_base: BaseDescription, adapter: Path) -> None:
    shown = run("adapter", "push", adapter, "-t", "acme", "-n", "law").stdout
    assert "published acme/law@1 (rank 4, " in shown
    assert "sha256:" in shown


def test_push_to_a_tenant_that_does_not_exist_exits_3(run: Command, known_base: BaseDescription, adapter: Path) -> None:
    result = run("adapter", "push", adapter, "--tenant", "nobody", "--name", "law")
    assert result.exit_code == 3
    assert result.stderr.startswith("tenant_not_found: ")


def test_push_refuses_the_name_of_the_base(push: Command, run_json: Command) -> None:
    assert push("served")["error"]["code"] == "name_is_base"
    assert run_json("adapter", "list") == {"data": []}


def test_push_of_no_folder_exits_3(run: Command, known_base: BaseDescription, tmp_path: Path) -> None:
    result = run("adapter", "push", tmp_path / "none", "--tenant", "acme", "--name", "law")
    assert result.exit_code == 3
    assert result.stderr == f"file_not_found: {tmp_path}/none: no such folder\n"


Spoil = Callable[[Path], object]


def _set_dora(folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "missing_config"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "missing_weights"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x80\x02}q\x00." * 9), "pickle"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "bad_json"),
        (_set_dora, "missing_magnitude"),
    ],
)
def test_push_refuses_an_unsound_adapter_by_a_code(
    push: Command, run: Command, adapter: Path, copy_of: Callable[[Path], Path], spoil: Spoil, code: str
) -> None:
    folder = copy_of(adapter)
    spoil(folder)
    assert push("law", folder=folder)["error"]["code"] == code
    assert run("adapter", "push", folder, "--tenant", "acme", "--name", "law").exit_code == 4


def test_the_same_content_is_the_same_version(push: Command) -> None:
    assert push("law")["id"] == push("law")["id"] == "law@1"


def test_list_and_show_know_versions(push: Command, run: Command, run_json: Command, adapters: dict[str, Path]) -> None:
    push("law")
    second = push("law", folder=adapters["med"])
    push("med")
    assert [each["id"] for each in run_json("adapter", "list")["data"]] == ["law@2", "med@1"]
    shown = run_json("adapter", "show", "law", "--tenant", "acme")
    assert shown["digest"] == second["digest"]
    assert [(each["id"], each["active"]) for each in shown["versions"]] == [("law@1", False), ("law@2", True)]
    assert run_json("adapter", "show", "law@1", "--tenant", "acme")["version"] == 1
    assert second["digest"] in run("adapter", "show", "law", "--tenant", "acme").stdout
    assert "law@2" in run("adapter", "list").stdout


def test_list_shows_one_tenants_or_everybodys(push: Command, run: Command, run_json: Command, adapter: Path) -> None:
    push("law")
    run("tenant", "create", "globex")
    run("adapter", "push", adapter, "--tenant", "globex", "--name", "law")
    assert [each["tenant"] for each in run_json("adapter", "list")["data"]] == ["acme", "globex"]
    assert [each["tenant"] for each in run_json("adapter", "list", "--tenant", "globex")["data"]] == ["globex"]
    assert run("adapter", "list", "--tenant", "nobody").exit_code == 3


def test_delete_takes_one_version_or_all(push: Command, run_json: Command, adapters: dict[str, Path]) -> None:
    first = push("law")
    push("law", folder=adapters["med"])
    assert run_json("adapter", "delete", "law@1", "--tenant", "acme")["digests"] == [first["digest"]]
    assert len(run_json("adapter", "show", "law", "--tenant", "acme")["versions"]) == 1
    run_json("adapter", "delete", "law", "--tenant", "acme")
    assert run_json("adapter", "show", "law", "--tenant", "acme")["error"]["code"] == "model_not_found"


def test_deleting_an_adapter_asks_first(push: Command, run: Command, run_json: Command) -> None:
    push("law")
    refused = run("adapter", "delete", "law", "--tenant", "acme", stdin="n\n")
    assert refused.exit_code == 1
    assert "law of acme with 1 versions" in refused.stdout
    assert len(run_json("adapter", "list")["data"]) == 1
    assert run("adapter", "delete", "law", "--tenant", "acme", "--yes").exit_code == 0
    assert run_json("adapter", "list") == {"data": []}


def test_what_does_not_exist_exits_3(push: Command, run: Command) -> None:
    push("law")
    for command in ("show", "delete"):
        assert run("adapter", command, "law@7", "--tenant", "acme", "--json").exit_code == 3
        assert run("adapter", command, "law", "--tenant", "globex", "--json").exit_code == 3


def test_versions_are_tried_promoted_and_taken_back(
    push: Command, run: Command, run_json: Command, adapters: dict[str, Path]
) -> None:
    push("law")
    assert push("law", "--no-activate", folder=adapters["med"])["active"] is False
    shown = run_json("adapter", "canary", "law@2", "--percent", "10", "--tenant", "acme")
    assert [each["percent"] for each in shown["versions"]] == [90, 10]
    assert run_json("adapter", "promote", "law", "--tenant", "acme")["version"] == 2
    assert run_json("adapter", "rollback", "law", "--tenant", "acme")["version"] == 1
    assert run("adapter", "rollback", "law", "--tenant", "acme").exit_code == 5
    told = run("adapter", "activate", "law@2", "--tenant", "acme").stdout
    assert told == "acme/law is answered by law@2 100 %\n"


def test_an_unloaded_adapter_is_shown_and_comes_back_when_activated(
    push: Command, run: Command, run_json: Command
) -> None:
    digest = push("law")["digest"]
    assert run_json("adapter", "unload", "law", "--tenant", "acme")["digests"] == [digest]
    assert run_json("adapter", "list")["data"][0]["loaded"] is False
    assert "unloaded" in run("adapter", "list").stdout
    assert run_json("adapter", "activate", "law@1", "--tenant", "acme")["loaded"] is True


def test_a_version_verb_without_a_version_says_what_is_missing(push: Command, run: Command) -> None:
    push("law")
    for command in (("activate",), ("canary", "--percent", "5")):
        result = run("adapter", command[0], "law", "--tenant", "acme", *command[1:])
        assert (result.exit_code, result.stderr) == (2, "bad_version: law: give the version, as in law@3\n")
