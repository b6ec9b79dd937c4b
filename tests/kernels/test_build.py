"""Where the C kernels cannot be built or kept, plain torch serves and the reason is known."""

from __future__ import annotations

import os

import pytest

from adapters_store.base.digests import remembered
from lora_kernels.native.build import native_build


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user that has no entry in its passwd."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_folder_is_served_by_torch() -> None:
    native_build.cache_clear()
    try:
        build = native_build()
    finally:
        native_build.cache_clear()
    assert build.library is None
    assert build.reason.endswith("no folder for the cache: set XDG_CACHE_HOME, or HOME")


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_folder_reads_a_base_each_time() -> None:
    assert remembered({"a key": lambda: "its value"}) == ["its value"]
