"""The admin key: made once, whole, and for its owner's eyes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.cli.common.admin_key import ENVIRONMENT, admin_key
from server.cli.common.failures import CommandError


@pytest.fixture(autouse=True)
def _no_key_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_a_key_is_made_once_and_kept(tmp_path: Path) -> None:
    first, second = admin_key(tmp_path), admin_key(tmp_path)
    assert first.is_new
    assert not second.is_new
    assert first.value == second.value
    assert len(first.value) >= 43  # 32 random bytes in base64
    assert [path.name for path in tmp_path.iterdir()] == ["admin.key"]


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = admin_key(tmp_path).path
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_key_from_the_environment_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "from-the-environment")
    key = admin_key(tmp_path)
    assert (key.value, key.path, key.is_new) == ("from-the-environment", None, False)
    assert list(tmp_path.iterdir()) == []


def test_two_keys_open_while_one_replaces_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "admin.key").write_text("the-new-admin-key\nthe-old-admin-key\n")
    assert admin_key(tmp_path).values == ("the-new-admin-key", "the-old-admin-key")
    monkeypatch.setenv(ENVIRONMENT, "the-newest-admin-key the-new-admin-key")
    assert admin_key(tmp_path).values == ("the-newest-admin-key", "the-new-admin-key")
    (tmp_path / "admin.key").write_text("the-new-admin-key\nshort\n")
    monkeypatch.delenv(ENVIRONMENT)
    with pytest.raises(CommandError):
        admin_key(tmp_path)


def test_starts_at_the_same_time_agree_on_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: admin_key(tmp_path), range(8)))
    assert len({key.value for key in keys}) == 1
    assert sum(key.is_new for key in keys) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["admin.key"]


@pytest.mark.parametrize("text", ["", "short", "has a space in it, and more", "nicht-ascii-schlüssel"])
def test_a_key_that_is_none_is_refused_by_its_place(tmp_path: Path, text: str) -> None:
    (tmp_path / "admin.key").write_text(text)
    with pytest.raises(CommandError, match=r"admin\.key: an admin key must") as caught:
        admin_key(tmp_path)
    assert caught.value.code == "bad_admin_key"


def test_a_key_file_that_is_no_text_is_refused_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "admin.key").write_bytes(b"\xff" * 20)
    with pytest.raises(CommandError, match=r"admin\.key: an admin key must"):
        admin_key(tmp_path)


def test_the_key_is_not_in_its_repr(tmp_path: Path) -> None:
    key = admin_key(tmp_path)
    assert key.value not in repr(key)
