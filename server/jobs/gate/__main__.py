"""`python -m server.jobs.gate RUN_DIR`: the gate as a process. See process.py, which is imported late."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lora_kernels.process import compile_nothing, unscanned_imports

if TYPE_CHECKING:
    from trainer.model.held import HeldBase


def preload() -> None:
    """Import all that the gate imports."""
    compile_nothing()
    with unscanned_imports():
        import server.jobs.gate.process  # noqa: F401


def main(arguments: list[str] | None = None, held: HeldBase | None = None) -> int:
    """The process. Returns its exit code. held: of a resident process."""
    preload()
    from server.jobs.gate.process import main

    return main(arguments, held)


if __name__ == "__main__":
    sys.exit(main())
