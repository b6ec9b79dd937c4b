"""One tiny base with adapters of every kind, shared by the engine's tests.

A fixture imports what it needs: on a machine without the store's packages the other tests still run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from support.servers.service import Service


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.servers.service import make_base

    return make_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from support.servers.service import save_adapters

    return save_adapters(base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def service(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    from support.servers.service import running

    with running(base, adapters, tmp_path_factory.mktemp("data")) as service:
        yield service


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Sixteen random prompts of 5..60 tokens."""
    from support.servers.service import VOCAB

    generator = torch.Generator().manual_seed(9)
    lengths = torch.randint(5, 60, (16,), generator=generator).tolist()
    return [torch.randint(4, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def weights_lie_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that is loaded on a CPU keeps its weights' rows as they lie."""
    from server.engine.model import lora_layers

    monkeypatch.setattr(lora_layers, "is_repacked_here", lambda weight: False)
