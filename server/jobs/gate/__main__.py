"""`python -m server.jobs.gate RUN_DIR`: the gate as a process. See process.py, which is imported late."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lora_kernels.process import compile_nothing, unscanned_imports

if TYPE_CHECKING:
    from trainer.model.held import HeldBase

_COPIES = 2  # of the base that a gate reads, in float32 at most


def preload() -> None:
    """Import all that the gate imports."""
    compile_nothing()
    with unscanned_imports():
        import server.jobs.gate.process  # noqa: F401


def keeps(_arguments: list[str], held: HeldBase | None) -> bool:
    """Whether memory is left for the served base and PEFT's beside what a resident process holds."""
    from lora_kernels.cgroups import free_host_bytes

    free = free_host_bytes()
    return held is None or free is None or free > _COPIES * held.float32_bytes


def main(arguments: list[str] | None = None, held: HeldBase | None = None) -> int:
    """The process. Returns its exit code. held: of a resident process."""
    preload()
    from server.jobs.gate.process import main

    return main(arguments, held)


if __name__ == "__main__":
    sys.exit(main())
