"""Where the blobs are: what the environment may say, and what is refused by the variable's name."""

from __future__ import annotations

import pytest

from adapters_store.remote.settings import CACHE_VARIABLE, URL_VARIABLE, RemoteSettings


def test_one_process_tells_another_what_it_was_given() -> None:
    settings = RemoteSettings(url="s3://bucket/prefix", cache_mib=12.5)
    assert RemoteSettings.from_environment(settings.to_environment()) == settings
    assert RemoteSettings.from_environment({CACHE_VARIABLE: "12.5"}) is None


@pytest.mark.parametrize("cache", ["lots", "nan", "inf", "0", "-1", "1" * 400])
def test_a_cache_that_is_no_size_is_refused_by_its_variable(cache: str) -> None:
    with pytest.raises(ValueError, match=f"{CACHE_VARIABLE} must be a number above 0, got") as refused:
        RemoteSettings.from_environment({URL_VARIABLE: "s3://bucket", CACHE_VARIABLE: cache})
    assert len(str(refused.value)) < 120
