"""The clients' flows are run by tests/clients/run.py; here those whose clients the tests have anyway."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("clients_run", HERE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_client_has_its_flow(runner: ModuleType) -> None:
    assert {client.flow for client in runner.CLIENTS} == set((HERE / "flows").glob("*_flow.py"))


@pytest.fixture(scope="module")
def environment(runner: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with runner._demo(tmp_path_factory.mktemp("demo")) as environment:
        yield environment


@pytest.mark.parametrize("name", ["openai", "anthropic"])
def test_the_stock_client_passes_against_the_demo(name: str, runner: ModuleType, environment: dict[str, str]) -> None:
    [stock] = [client for client in runner.CLIENTS if client.name == name]
    result = runner._run(stock, Path(sys.executable), environment)
    assert result.passed, result.output


def test_a_flow_that_fails_is_reported(runner: ModuleType, environment: dict[str, str]) -> None:
    [openai] = [client for client in runner.CLIENTS if client.name == "openai"]
    result = runner._run(openai, Path(sys.executable), {**environment, "CLIENT_KEY": "ml-wrong"})
    assert not result.passed
    assert "Error code: 401" in result.output
