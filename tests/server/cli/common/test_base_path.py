"""Which folder a `--base` means."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.cli.common.base_path import find_base
from server.cli.common.failures import CommandError


def test_a_folder_is_itself(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_base(str(base)) == (base, "tiny")
    monkeypatch.chdir(base)
    assert find_base(".") == (Path(), "tiny")


def test_the_home_folder_is_understood(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(base.parent))
    assert find_base("~/tiny") == (base, "tiny")


def test_a_hub_id_means_its_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that `hf download` leaves behind."""
    repo = tmp_path / "models--acme--tiny-llama"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_base("acme/tiny-llama") == (snapshot, "tiny-llama")


def test_neither_is_said_by_code() -> None:
    with pytest.raises(CommandError, match="no such folder") as caught:
        find_base("/no/such/folder")
    assert caught.value.code == "base_not_found"
