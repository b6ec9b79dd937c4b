"""The commands as a shell runs them: in this process through typer's runner, or as a real server process."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from adapters_store.base.files import describe_base
from server.cli.main import app
from support.models.adapter_files import config_bytes, lora_tensors, safetensors_bytes
from support.servers.service import make_base
from support.servers.waiting import wait_until

Command = Callable[..., Result]
SMALL = ("--kv-cache-mib", "16", "--adapter-pool-mib", "16", "--host-cache-mib", "16", "--threads", "1")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command sets up its process's logging, on a stderr that ends with the runner."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def run(data_dir: Path) -> Command:
    """run("tenant", "create", "acme"): the command's result; the data directory comes by the environment."""

    def invoke(*arguments: str | Path, stdin: str | None = None, env: dict[str, str] | None = None) -> Result:
        environment = {"MULTILORA_DATA_DIR": str(data_dir), **(env or {})}
        result = CliRunner().invoke(app, [str(each) for each in arguments], input=stdin, env=environment)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


@pytest.fixture
def run_json(run: Command) -> Callable[..., Any]:
    """The one object that a command with --json prints."""

    def invoke(*arguments: str | Path, **options: Any) -> Any:
        result = run(*arguments, "--json", **options)
        assert result.stdout.count("\n") == 1, result.output
        return json.loads(result.stdout)

    return invoke


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer and a chat template, called "tiny"."""
    return make_base(tmp_path_factory.mktemp("cli-base") / "tiny")


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT LoRA folder for `base`."""
    return write_adapter(base, tmp_path_factory.mktemp("cli-adapter"), seed=0)


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three different ones, by tenant."""
    root = tmp_path_factory.mktemp("cli-adapters")
    return {name: write_adapter(base, root / name, seed=seed) for seed, name in enumerate(("law", "med", "code"))}


def write_adapter(base: Path, folder: Path, *, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = lora_tensors(describe_base(base), seed=seed)
    (folder / "adapter_config.json").write_bytes(config_bytes())
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


class RunningServer:
    """A process that serves on a local port, and all that it has printed."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        self.log: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=pair)
            for pair in ((process.stdout, self.lines), (process.stderr, self.log))
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))  # noqa: PERF401  others look on meanwhile

    @property
    def events(self) -> list[dict[str, Any]]:
        """What --json printed."""
        return [json.loads(line) for line in self.lines]

    def is_ready(self) -> bool:
        assert self.process.poll() is None, "\n".join([*self.lines, *self.log])
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, number: int, *, timeout_s: float = 20.0) -> int:
        """Send the signal; the exit code."""
        self.process.send_signal(number)
        return self.ended(timeout_s=timeout_s)

    def ended(self, *, timeout_s: float = 20.0) -> int:
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join()
        return code


@contextmanager
def server_process(
    *arguments: str | Path, env: dict[str, str] | None = None, driver: Path | None = None
) -> Iterator[RunningServer]:
    """`multilora ARGUMENTS` on a free port, as the installed command, ready or not; killed at the end.

    driver: a script that prepares the process and then calls the command.
    """
    port = free_port()
    program = [Path(sys.executable).with_name("multilora")] if driver is None else [sys.executable, driver]
    command = [*program, *arguments, "--port", port]
    process = subprocess.Popen(
        [str(each) for each in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    server = RunningServer(process, port)
    try:
        yield server
    finally:
        process.kill()
        server.ended()


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """start("demo", "--once"): a context with the running process."""
    return server_process


@pytest.fixture(scope="session")
def serve_process() -> Callable[..., Any]:
    """The same for `serve`, in little memory."""
    return lambda *arguments, **options: server_process("serve", *SMALL, *arguments, **options)


@pytest.fixture(scope="session")
def wait_ready() -> Callable[[RunningServer], None]:
    return lambda server: wait_until(server.is_ready)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def unused_port() -> int:
    return free_port()


@pytest.fixture
def busy_port() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a folder, to be spoilt."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))
