"""Fixtures for the demo's tests: the shipped base and adapters, loaded once, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.demo.assets import demo_adapters, demo_base_path


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_base_path())


@pytest.fixture(scope="session")
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_base_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def adapted() -> dict[str, Any]:
    """Tenant name -> a base of its own with the tenant's adapter on it."""
    models = {}
    for name, folder in demo_adapters().items():
        model = AutoModelForCausalLM.from_pretrained(demo_base_path(), dtype=torch.float32)
        models[name] = PeftModel.from_pretrained(model, str(folder)).eval()
    return models
