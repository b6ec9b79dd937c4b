"""The size of an uploaded file: its own limit, whatever that of adapters is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.engine_client import EngineClient
from server.api.settings import ApiSettings
from server.jobs.limits import JobLimits

MAX_FILE_BYTES = 300_000


@pytest.fixture(scope="module")
def app(engine: EngineClient, store: AdapterStore, data_dir: Path) -> FastAPI:
    settings = ApiSettings(data_dir=data_dir, max_adapter_bytes=1000, max_config_bytes=1000)
    return create_app(
        engine=engine, store=store, settings=settings, job_limits=JobLimits(max_file_bytes=MAX_FILE_BYTES)
    )


def upload(client: httpx.Client, num_bytes: int) -> Any:
    file = ("night.jsonl", b"x" * num_bytes)
    return client.post("/v1/files", data={"purpose": "batch"}, files={"file": file})


def test_a_file_may_be_larger_than_an_adapter(client: httpx.Client) -> None:
    made = upload(client, MAX_FILE_BYTES)
    assert made.status_code == 200, made.text
    assert made.json()["bytes"] == MAX_FILE_BYTES


@pytest.mark.parametrize("num_bytes", [MAX_FILE_BYTES + 1, 2 * MAX_FILE_BYTES])
def test_a_larger_file_is_a_413_that_names_the_limit(client: httpx.Client, num_bytes: int) -> None:
    error = upload(client, num_bytes)
    assert error.status_code == 413
    assert "at most 3" in error.json()["error"]["message"]
