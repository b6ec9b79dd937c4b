"""Starts and ends servers as processes of their own, ours among them. Knows commands and ports; knows no load."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Protocol

from adapters_store.store import AdapterStore
from benchmarks.common.adapters import TENANT
from benchmarks.common.shapes import BenchShape, base_folder, bench_cache
from benchmarks.common.workload import bench_engine
from benchmarks.peers.client import Ask
from benchmarks.peers.loads import MakeAsk
from benchmarks.serving.child import child
from server.api.app import create_app
from server.api.edge.connections.server import ListenSettings, build_server
from server.api.settings import ApiSettings

START_TIMEOUT_S = 900.0  # a peer may compile its model first
REPOSITORY = Path(__file__).parents[2]


class Side(Protocol):
    """A server to be measured. settings: those to try, the peer's own default first."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> tuple[str, ...]: ...

    def running(self, setting: str, *, adapters: bool = True) -> AbstractContextManager[MakeAsk]:
        """Ready to answer inside the block. adapters: False: only the base will be asked."""


@dataclass(frozen=True)
class InstalledPeer:
    """Another project's server. adapters: their folders. packages: where its environment's packages are."""

    shape: BenchShape
    adapters: Sequence[Path]
    log: Path
    settings: tuple[str, ...]
    packages: Path


@dataclass(frozen=True)
class Ours:
    """`multilora serve` as an operator starts it, on the store of the benchmarks' adapters."""

    shape: BenchShape
    adapter_names: Sequence[str]
    log: Path
    name: str = "multilora"
    settings: tuple[str, ...] = ("as it starts",)

    @contextmanager
    def running(self, setting: str, *, adapters: bool = True) -> Iterator[MakeAsk]:
        base, store = base_folder(self.shape), bench_cache() / f"{self.shape.name}-store"
        command = [sys.executable, "-c", "from server.cli.main import main; main()", "serve", "--base", str(base)]
        command += ["--data-dir", str(store), "--auth", "off", "--kv-cache-mib", "1024"]
        command += ["--adapter-pool-mib", "512", "--host-cache-mib", "512", "--port"]
        with served(command, {}, "/ready", self.log) as url:
            yield self.ask_at(url)

    def ask_at(self, url: str) -> MakeAsk:
        def ask(prompt: list[int], new: int, adapter: int | None) -> Ask:
            model = base_folder(self.shape).name if adapter is None else self.adapter_names[adapter]
            return Ask(url, prompt, new, {"model": model}, {"x-tenant-id": TENANT})

        return ask


@dataclass(frozen=True)
class OursHere(Ours):
    """The same API and engine on a thread of this process, for `--quick`: no second process has to start."""

    @contextmanager
    def running(self, setting: str, *, adapters: bool = True) -> Iterator[MakeAsk]:
        data = bench_cache() / f"{self.shape.name}-store"
        store = AdapterStore.open(data)
        count = len(self.adapter_names)
        with bench_engine(self.shape, store, pool_adapters=count, host_adapters=count) as parts:
            parts.worker.start()
            app = create_app(engine=parts.worker, store=store, settings=ApiSettings(data_dir=data, auth="off"))
            server = build_server(app, app.state.context.settings, ListenSettings(grace_s=2))
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                listener.listen()
                thread = Thread(target=server.run, kwargs={"sockets": [listener]})
                thread.start()
                try:
                    yield self.ask_at(f"http://127.0.0.1:{listener.getsockname()[1]}")
                finally:
                    server.should_exit = True
                    thread.join()
        store.close()


@contextmanager
def served(command: Sequence[str], environment: Mapping[str, str], health: str, log: Path) -> Iterator[str]:
    """The URL of `command PORT`, when its health route answers 200; all of its processes are gone when the block ends.
    Raises RuntimeError with the end of the log if it does not start."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    own = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS" or command[0] == sys.executable}
    with (
        log.open("ab") as output,
        child(
            [*command, str(port)],
            env={**own, **environment},
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        _wait_until_healthy(process, url + health, log)
        yield url


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[str], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline_s:
                end = log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{process.args!r} did not start (exit {process.poll()}):\n{end}") from None
            time.sleep(0.25)
