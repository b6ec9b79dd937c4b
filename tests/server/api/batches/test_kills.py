"""Servers killed while they answer a batch: every line is in the files once. MULTILORA_BATCH_KILLS: how many (4)."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import openai

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.settings import ApiSettings
from server.engine.text.tokenizer import Tokenizer
from support.models.adapter_files import tiny_base
from support.models.tokenizer_zoo import byte_level, wrapped
from support.servers.batch_client import chat_line, create, ended, read, running
from support.servers.live_server import serving
from support.servers.waiting import wait_until
from support.worlds.fake_engine import FakeEngine

NUM_KILLS = int(os.environ.get("MULTILORA_BATCH_KILLS", "4"))
NUM_LINES = 60
fork = multiprocessing.get_context("fork")


def serve(data_dir: Path, said: Connection) -> None:
    store = AdapterStore.open(data_dir)
    with FakeEngine(tiny_base(), Tokenizer(wrapped(byte_level())), step_s=0.002) as engine:
        app = create_app(engine=engine, store=store, settings=ApiSettings(data_dir=data_dir, auth="off"))
        with serving(app) as url, running(app):
            said.send(url)
            time.sleep(3600)


@contextmanager
def killed_at_the_end(data_dir: Path) -> Iterator[openai.OpenAI]:
    """A client of a server in a process of its own, which `kill -9` ends with the block."""
    heard, said = fork.Pipe(duplex=False)
    process = fork.Process(target=serve, args=(data_dir, said))
    process.start()
    try:
        with openai.OpenAI(base_url=f"{heard.recv()}/v1", api_key="any", max_retries=0) as ai:
            yield ai
    finally:
        process.kill()
        process.join()


def test_no_line_is_lost_or_doubled_when_servers_are_killed(tmp_path: Path) -> None:
    AdapterStore.open(tmp_path).close()
    with killed_at_the_end(tmp_path) as ai:
        batch = create(ai, [chat_line(f"line {number}", f"Question {number}?") for number in range(NUM_LINES)])
    rng, counts = random.Random(NUM_KILLS), [0]

    def has_grown(ai: openai.OpenAI, wanted: int) -> bool:
        now = ai.batches.retrieve(batch.id)
        counts.append(now.request_counts.completed)
        return now.status == "completed" or counts[-1] >= wanted

    for kill in range(1, NUM_KILLS + 1):
        with killed_at_the_end(tmp_path) as ai:
            wait_until(partial(has_grown, ai, NUM_LINES * kill // (NUM_KILLS + 1)))
            time.sleep(rng.random() / 20)
    with killed_at_the_end(tmp_path) as ai:
        batch = ended(ai, batch.id)
        lines = read(ai, batch.output_file_id)
        own = [file.id for file in ai.files.list() if file.purpose == "batch_output"]
    assert counts == sorted(counts), "an answer that was kept is gone"
    assert batch.status == "completed"
    assert [line["custom_id"] for line in lines] == [f"line {number}" for number in range(NUM_LINES)]
    assert [line["response"]["status_code"] for line in lines] == [200] * NUM_LINES
    assert (batch.error_file_id, own) == (None, [batch.output_file_id])
