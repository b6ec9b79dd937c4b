"""The worker's settings and their command line. Names and defaults only."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapters_store.remote.settings import RemoteSettings
from server.jobs.settings import JobSettings

LOCK_FILE = "jobs-worker.lock"
DATABASE_URL_VARIABLE = "MULTILORA_DATABASE_URL"


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """database_url None: SQLite in data_dir. remote: the object store of the blobs, from the environment. max_running:
    trainings at once. memory_bytes: for all of them together. threads: of one training. idle_threads:
    while nothing else works on its machine (None: the same). tick_s: between two looks at
    the jobs. grace_s: for trainings to checkpoint at the worker's end.

    trainer, gate: replace the real commands, in tests and in images for other executors. jobs: what runs them.
    """

    data_dir: Path
    database_url: str | None = field(default=None, repr=False)
    remote: RemoteSettings | None = None
    max_running: int = 1
    memory_bytes: int | None = None
    threads: int | None = None
    idle_threads: int | None = None
    tick_s: float = 0.2
    grace_s: float = 20.0
    retry_wait_s: float = 1.0
    trainer: tuple[str, ...] | None = None
    gate: tuple[str, ...] | None = None
    jobs: JobSettings = field(default_factory=JobSettings)


def parse(arguments: Sequence[str] | None, description: str | None) -> tuple[WorkerSettings, bool]:
    """The settings, and whether the worker ends when its stdin does."""
    parser = argparse.ArgumentParser(prog="python -m server.jobs.worker.worker", description=description)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--database-url", default=os.environ.get(DATABASE_URL_VARIABLE))
    parser.add_argument("--max-running", type=int, default=1)
    parser.add_argument("--memory-bytes", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--idle-threads", type=int)
    parser.add_argument("--tick-s", type=float, default=0.2)
    parser.add_argument("--retry-wait-s", type=float, default=1.0)
    parser.add_argument("--jobs", type=JobSettings.from_json, default=JobSettings(), help="JobSettings, as JSON")
    parser.add_argument("--trainer", type=json.loads, help="another training command, as a JSON list")
    parser.add_argument("--gate", type=json.loads, help="another measuring command, as a JSON list")
    parser.add_argument("--watch-stdin", action="store_true", help="end when stdin does")
    options = vars(parser.parse_args(arguments))
    watch_stdin = options.pop("watch_stdin")
    for name in ("trainer", "gate"):
        options[name] = None if options[name] is None else tuple(options[name])
    return WorkerSettings(**options, remote=RemoteSettings.from_environment()), watch_stdin
