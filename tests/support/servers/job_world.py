"""A data directory with tenants, a served base and a worker process, whose trainer and gate need no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters_store.store import AdapterStore
from server.jobs.limits import JobLimits
from server.jobs.served_base import ServedBase
from server.jobs.service import Onboarding
from server.jobs.store.job_request import JobRequest
from server.jobs.store.records import DataFile, Job
from server.jobs.worker.leader import is_led
from support.models.adapter_files import tiny_base
from support.servers.waiting import wait_until

TRAINERS = Path(__file__).parents[1] / "trainers"
TRAINER = (sys.executable, str(TRAINERS / "tiny_trainer.py"))
GATE = (sys.executable, str(TRAINERS / "tiny_gate.py"))
BASE_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
}
MODEL = "tiny"


def data_lines(count: int = 12, *, salt: object = "", **behaviour: Any) -> bytes:
    """A sound JSONL file whose first message tells the tiny trainer how to behave."""
    asked = [json.dumps({**behaviour, "salt": str(salt)}), *(f"Question {index}?" for index in range(1, count))]
    lines = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"Answer {index}."}]}
        for index, text in enumerate(asked)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def make_base_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BASE_CONFIG))
    return folder


class JobWorld:
    """Tenants acme and globex, the base `tiny` served."""

    def __init__(self, root: Path, *, database_url: str | None = None, limits: JobLimits | None = None) -> None:
        self.root = root
        self.data_dir = root / "data"
        self.database_url = database_url
        self.store = AdapterStore.open(self.data_dir, database_url=database_url)
        self.base = tiny_base()
        self.store.remember_base(self.base)
        folder = make_base_folder(root / "base")
        self.onboarding = Onboarding.open(self.data_dir, database_url=database_url, limits=limits)
        self.jobs = self.onboarding.jobs
        self.jobs.bases.remember(ServedBase(path=folder, name=MODEL, digest=self.base.digest))
        for tenant in ("acme", "globex"):
            self.store.tenants.create(tenant)
        self.worker: subprocess.Popen[bytes] | None = None

    def upload(self, data: bytes, tenant: str = "acme", filename: str = "data.jsonl") -> DataFile:
        source = self.root / "upload"
        source.write_bytes(data)
        return self.onboarding.files.add(tenant=tenant, filename=filename, purpose="fine-tune", source=source)

    def create(self, tenant: str = "acme", name: str | None = "style", **behaviour: Any) -> Job:
        file = self.upload(data_lines(**behaviour), tenant)
        return self.onboarding.create(tenant, JobRequest(model=MODEL, training_file=file.id, suffix=name))

    def start_worker(self, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "server.jobs.worker.worker", "--data-dir", str(self.data_dir)]
        command += ["--trainer", json.dumps(TRAINER), "--gate", json.dumps(GATE)]
        command += ["--tick-s", "0.05", "--retry-wait-s", "0.05", *options]
        if self.database_url is not None:
            command += ["--database-url", self.database_url]
        self.worker = subprocess.Popen(command, cwd=TRAINERS.parents[2])
        wait_until(lambda: is_led(self.onboarding.database, self.data_dir))
        return self.worker

    def kill_worker(self) -> None:
        assert self.worker is not None
        self.worker.kill()
        self.worker.wait()

    def wait(self, job: Job, condition: Callable[[Job], object], *, timeout_s: float = 180.0) -> Job:
        wait_until(lambda: condition(self.jobs.get(job.id)), timeout_s=timeout_s)
        return self.jobs.get(job.id)

    def wait_ended(self, job: Job, *, timeout_s: float = 180.0) -> Job:
        return self.wait(job, lambda each: each.status.has_ended, timeout_s=timeout_s)

    def messages(self, job: Job) -> list[str]:
        """What the job told, oldest first."""
        return [event.message for event in reversed(self.jobs.events(job)) if event.type == "message"]

    def close(self) -> None:
        if self.worker is not None and self.worker.poll() is None:
            self.worker.terminate()
            try:
                self.worker.wait(180)
            except subprocess.TimeoutExpired:
                self.worker.kill()
                self.worker.wait()
        self.onboarding.close()
        self.store.close()
