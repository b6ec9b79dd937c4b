"""`multilora serve` on the demo's base, as a process of its own on a free port. Knows the command; knows no load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.child import child
from server.demo.assets import BASE_FOLDER, BASE_NAME

ADMIN_KEY = "admin-key-of-the-benchmark"


@dataclass(frozen=True, kw_only=True)
class MemoryMib:
    """Room on the one thread's device and in host memory, MiB."""

    kv_cache: int = 64
    adapter_pool: int = 64
    host_cache: int = 64

    @property
    def options(self) -> list[str]:
        values = {"kv-cache": self.kv_cache, "adapter-pool": self.adapter_pool, "host-cache": self.host_cache}
        return [word for name, mib in values.items() for word in (f"--{name}-mib", str(mib))]


@dataclass(frozen=True, slots=True)
class DemoServer:
    url: str
    pid: int


@contextmanager
def demo_server(
    data_dir: Path, memory: MemoryMib, *, log: Path | None = None, base: Path = BASE_FOLDER, options: Sequence[str] = ()
) -> Iterator[DemoServer]:
    """Ready to serve, its log in `log`; gone when the block ends. Raises RuntimeError if it does not start."""
    command = [sys.executable, "-c", "from server.cli.main import main; main()", "serve", "--base", str(base)]
    command += ["--served-name", BASE_NAME, "--data-dir", str(data_dir), "--port", "0", "--json", "--threads", "1"]
    environment = {**os.environ, "MULTILORA_ADMIN_KEY": ADMIN_KEY}
    command += [*memory.options, *options]
    with (
        Path(log or os.devnull).open("wb") as stderr,
        child(command, env=environment, stdout=subprocess.PIPE, stderr=stderr) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event.get("event") == "ready":
                threading.Thread(target=process.stdout.read, daemon=True).start()
                yield DemoServer(event["url"], event["pid"])
                return
        raise RuntimeError(f"the server ended with {process.wait()} before it was ready")


def auth(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
