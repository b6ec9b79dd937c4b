"""A program for a resident process: `main` does what its first argument says. No model."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

WITH_TORCH = "TEST_WITH_TORCH"
_SLEEP = "import time; time.sleep(600)"


def preload() -> None:
    if os.environ.get(WITH_TORCH):
        import torch  # noqa: F401


def main(arguments: list[str], held: object) -> int:
    what, *rest = arguments
    if what == "facts":
        _print_facts()
    elif what == "sleep":
        Path(rest[0]).touch()
        time.sleep(600)
    elif what == "grandchild":
        subprocess.run([sys.executable, "-c", _SLEEP], check=True)
    elif what == "abort":
        os.abort()
    elif what == "too much":
        _allocate_all()
    elif what == "raise":
        raise RuntimeError("as the test told it")
    elif what == "append":
        with Path(rest[0]).open("a") as stream:
            stream.write("x")
        time.sleep(0.5)
    return int(rest[-1]) if what == "exit" else 0


def _print_facts() -> None:
    """What a task finds of its threads, its random numbers, its files and its place."""
    import numpy as np
    import torch

    before = len(os.listdir("/proc/self/task"))  # a linear algebra library may have threads of its own
    weight = torch.rand(300, 300, requires_grad=True)
    (weight @ weight).relu().sum().backward()
    started = len(os.listdir("/proc/self/task")) - before
    print(torch.get_num_threads(), started, os.nice(0), os.environ.get("TOLD"), threading.active_count())
    print(sorted(_open_files()))
    print(float(weight.detach()[0, 0]), float(np.random.rand()))


def _open_files() -> Iterator[str]:
    """Beside input and output."""
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            if int(descriptor) > 2:
                yield Path(name).name


def _allocate_all() -> None:
    """As a training that takes more than there is."""
    import resource

    import torch

    resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
    torch.ones(1 << 34)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], None))
