"""A real PostgreSQL for the length of a block, run as the user that Debian's package makes."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def binaries() -> Path | None:
    """The newest installed server's folder."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """A new cluster on a free local port; its SQLAlchemy URL."""
    bin_dir = binaries()
    assert bin_dir is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "pg"
    data.mkdir()
    _as_owner([bin_dir / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8"], folder)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={data} -c fsync=off"
    _as_owner([bin_dir / "pg_ctl", "-D", data, "-w", "-l", data / "log", "-o", options, "start"], folder)
    try:
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    finally:
        _as_owner([bin_dir / "pg_ctl", "-D", data, "-m", "immediate", "stop"], folder)


def _as_owner(command: list[object], folder: Path) -> None:
    """PostgreSQL refuses to run as root: then it runs as nobody, who must be let into the folder."""
    words = [str(word) for word in command]
    if getpass.getuser() == "root" or os.geteuid() == 0:
        for parent in (folder, *folder.parents[:3]):
            if parent != Path("/tmp"):
                parent.chmod(parent.stat().st_mode | 0o711)
        shutil.chown(folder / "pg", "nobody")
        words = ["setpriv", "--reuid", "nobody", "--clear-groups", *words]
    done = subprocess.run(words, capture_output=True, text=True, cwd="/", timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
