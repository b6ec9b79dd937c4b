"""The commands refuse a wrong pair in one line, and `adopt` joins what belongs together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.servers import postgres

Command = Callable[..., Any]


def test_a_wrong_pair_is_refused_by_every_command_until_it_is_adopted(
    run: Command, run_json: Command, data_dir: Path, tmp_path: Path
) -> None:
    with postgres.running() as full_url:
        env = {"MULTILORA_DATABASE_URL": full_url}
        run_json("tenant", "create", "acme", env=env)
        shutil.copytree(data_dir, tmp_path / "kept")
        for words in (("tenant", "list"), ("quarantine", "check"), ("jobs", "list"), ("audit",)):
            result = run(*words)
            assert (result.exit_code, result.stdout) == (1, "")
            assert result.stderr.startswith("wrong_store: ")
            assert "multilora adopt" in result.stderr
        (data_dir / "store.json").unlink()  # restored without it
        assert run_json("tenant", "list", env=env)["error"]["code"] == "wrong_store"
        adopted = run_json("adopt", env=env)
        assert [each["tenant"] for each in run_json("tenant", "list", env=env)["data"]] == ["acme"]
        assert adopted["store_id"] in (tmp_path / "kept" / "store.json").read_text()


def test_adopt_asks_and_a_no_changes_nothing(run: Command, data_dir: Path) -> None:
    run("tenant", "create", "acme")
    before = (data_dir / "store.json").read_bytes()
    assert run("adopt", stdin="n\n").exit_code == 1
    assert (data_dir / "store.json").read_bytes() == before
    assert run("adopt", "--yes").exit_code == 0
    assert (data_dir / "store.json").read_bytes() != before


def test_adopt_needs_a_directory(run_json: Command, tmp_path: Path) -> None:
    answer = run_json("adopt", "--data-dir", tmp_path / "none")
    assert answer["error"]["code"] == "data_dir_gone"
    assert not (tmp_path / "none").exists()
