"""How libgomp's compute threads wait, and how many there are. Imports no torch: it must be asked before torch is.

A step is about a hundred parallel regions, 10 to 30 us apart. libgomp's threads spin between regions only while the
process has no more compute threads than cores; a second pool (a loader's, a main thread's) makes every region end in a
sleep and a wake-up: a decode step of 10 ms became 15. So only the engine's thread may keep a pool.
"""

from __future__ import annotations

import os

SPINS = 2000  # about 30 us: bridges the gap between two regions, and yields soon where cores are shared


def spin_briefly() -> None:
    """Call before torch is imported. An own GOMP_SPINCOUNT or OMP_WAIT_POLICY is left alone."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def release_compute_threads() -> None:
    """End the calling thread's pool of compute threads; the next parallel region would make a new one."""
    from lora_kernels.native.build import native_build

    library = native_build().library
    if library is not None:
        library.ml_release_threads()
