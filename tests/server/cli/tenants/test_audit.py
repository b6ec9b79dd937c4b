"""`multilora audit` on a real store."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., Any]


def test_what_the_commands_did_is_shown_with_who_did_it(
    run: Command, run_json: Command, base: Path, adapter: Path
) -> None:
    assert "no entries yet" in run("audit").stdout
    run("tenant", "create", "acme")
    run("tenant", "create", "globex")
    run("adapter", "push", adapter, "--tenant", "acme", "--name", "law", "--base", base)
    run("adapter", "delete", "law", "--tenant", "acme", "--yes")
    entries = run_json("audit", "--tenant", "acme")["data"]
    assert [entry["action"] for entry in entries] == ["adapter.delete", "adapter.upload", "tenant.create"]
    assert {entry["actor"] for entry in entries} == {f"cli:uid{os.getuid()}"}
    assert len(run_json("audit")["data"]) == 4
    assert len(run_json("audit", "--limit", "2")["data"]) == 2
    older = run_json("audit", "--before", str(entries[1]["id"]))["data"]
    assert [entry["tenant"] for entry in older] == ["globex", "acme"]
    shown = run("audit").stdout
    assert "adapter.upload" in shown
    assert "law@1" in shown
