"""Batches as the stock openai client makes and reads them, and the runner that answers them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openai
from fastapi import FastAPI

from server.api.batches.runner import BatchRunner
from server.jobs.store.batch_store import UNFINISHED
from support.servers.waiting import wait_until

CHAT = "/v1/chat/completions"
Lines = Sequence[dict[str, Any]]


def chat_line(custom_id: str, text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 30, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def jsonl(lines: Lines) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def upload(ai: openai.OpenAI, data: bytes, purpose: Any = "batch") -> str:
    return ai.files.create(file=("batch.jsonl", data), purpose=purpose).id


def create(ai: openai.OpenAI, lines: Lines, endpoint: Any = CHAT, **fields: Any) -> Any:
    file_id = upload(ai, jsonl(lines))
    return ai.batches.create(input_file_id=file_id, endpoint=endpoint, completion_window="24h", **fields)


def ended(ai: openai.OpenAI, batch_id: str) -> Any:
    """The batch once it has ended."""
    wait_until(lambda: ai.batches.retrieve(batch_id).status not in UNFINISHED)
    return ai.batches.retrieve(batch_id)


def read(ai: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of an output or error file; none without a file."""
    return [] if file_id is None else [json.loads(line) for line in ai.files.content(file_id).text.splitlines()]


@contextmanager
def running(app: FastAPI) -> Iterator[BatchRunner]:
    runner = BatchRunner(app.state.context, app.state.onboarding)
    runner.start()
    try:
        yield runner
    finally:
        runner.stop()
