"""A Ray node that ends with its standard input: `python ray_node.py LISTEN_PORT RAY_START_WORDS...`.

The program adopts every process of the node, also those whose parent died, and kills them when the test's process
closes the pipe or dies. Linux only (prctl).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from contextlib import suppress

import psutil

_PR_SET_CHILD_SUBREAPER = 36
# `ray start` gives the agent's port to the agent alone, so a raylet waits for it, for 15 s: too few on a busy machine
_START = """
import sys
from ray._private import ray_constants, services
from ray.scripts.scripts import main
port, start = sys.argv.pop(1), services.start_ray_process
def start_with_port(command, process_type, **options):
    is_raylet = process_type == ray_constants.PROCESS_TYPE_RAYLET
    return start([*command, f"--dashboard_agent_listen_port={port}"] if is_raylet else command, process_type, **options)
services.start_ray_process = start_with_port
main()
"""


def main() -> None:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0, "no adoption of orphans here"
    start = subprocess.Popen([sys.executable, "-c", _START, *sys.argv[1:]], stdin=subprocess.DEVNULL)
    sys.stdin.read()
    start.kill()
    while living := psutil.Process().children(recursive=True):
        for process in living:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _bury()
        time.sleep(0.02)


def _bury() -> None:
    """A dead child stays one until it is waited for."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


if __name__ == "__main__":
    main()
