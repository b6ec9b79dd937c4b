"""What processes of one user remember of bases, in one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store.base.digests import remembered


@pytest.fixture(autouse=True)
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "multilora" / "base-digests.json"


def making(value: str) -> Callable[[], str]:
    return lambda: value


def test_what_another_remembers_meanwhile_is_kept() -> None:
    def slow() -> str:
        remembered({"other": making("1")})
        return "2"

    assert remembered({"own": slow}) == ["2"]
    assert remembered({"other": making("new"), "own": making("new")}) == ["1", "2"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b"{", b"\0\0", b'"x"'])
def test_a_damaged_file_is_made_again(known: Path, content: bytes) -> None:
    known.parent.mkdir()
    known.write_bytes(content)
    assert remembered({"key": making("1")}) == ["1"]
    assert remembered({"key": making("new")}) == ["1"]


def test_where_nothing_can_be_written_it_is_made_each_time(known: Path) -> None:
    known.parent.write_text("a file where the folder should be")
    assert remembered({"key": making("1")}) == ["1"]
    assert remembered({"key": making("2")}) == ["2"]
