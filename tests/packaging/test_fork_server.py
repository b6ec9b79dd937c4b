"""A process that the tests start by fork is the one that its command line would have started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.processes import fork_server, probe
from support.processes.fork_server import EXECUTE, FORK, ForkServer, is_program


def found(code: str, folder: Path, *, forked: bool, new_session: bool) -> tuple[int, dict[str, Any], str]:
    """Exit code, what the probe printed, and the last line of its errors."""
    environment = {**os.environ, "PARENT": str(os.getpid()), "OWN": "value", **({} if forked else {EXECUTE: "1"})}
    done = subprocess.run(
        [sys.executable, "-P", probe.__file__, code, "--word"],
        input="typed",
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
        start_new_session=new_session,
    )
    seen = json.loads(done.stdout)
    seen["environment"].pop(EXECUTE, None)
    return done.returncode, seen, done.stderr.strip().rpartition("\n")[2]


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """Also where no other test has one."""
    if FORK in os.environ or sys.platform != "linux":
        yield
        return
    ForkServer().install()
    yield
    ForkServer.uninstall()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all processes are executed")
@pytest.mark.parametrize("new_session", [False, True])
@pytest.mark.parametrize("code", ["0", "3", "words", "raise", "term"])
def test_a_forked_process_is_what_its_command_starts(
    code: str, new_session: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "SCRIPTS", frozenset({"probe.py"}))
    real = found(code, tmp_path, forked=False, new_session=new_session)
    forked = found(code, tmp_path, forked=True, new_session=new_session)
    assert (forked[0], forked[2]) == (real[0], real[2])
    assert {name: (forked[1][name], real[1][name]) for name in real[1] if forked[1][name] != real[1][name]} == {}
    assert real[1]["is_child"]


def test_only_the_products_own_programs_are_forked() -> None:
    python = sys.executable
    launcher = [python, "-I", "-S", "/any/server/jobs/tasks/launch.py", "folder", "name", "5", "--"]
    assert is_program([python, "-P", "-m", "trainer", "spec.yaml"])
    assert is_program([*launcher, python, "-P", "-m", "trainer", "spec.yaml"])
    assert is_program([str(Path(python).with_name("multilora")), "serve"])
    assert not is_program([*launcher, "/bin/true"])
    assert not is_program([python, "-c", "import trainer"])
    assert not is_program([python, "-m", "pytest"])
    assert not is_program(["/bin/sh", "-c", "true"])
