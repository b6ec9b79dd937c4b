"""How libgomp's compute threads wait, and how many there are. Imports no torch: it must be asked before torch is.

A step is about a hundred parallel regions, 10 to 30 us apart. libgomp's threads spin between regions only while the
process has no more compute threads than cores; a second pool (a loader's, a main thread's) makes every region end in a
sleep and a wake-up: a decode step of 10 ms became 15. So only the engine's thread may keep a pool.
"""

from __future__ import annotations

import os

from lora_kernels.cgroups import affinity, physical_cores, usable_cpus

OMP_THREADS = "OMP_NUM_THREADS"
_OWN_CHOICE = "MULTILORA_OMP_NUM_THREADS"  # what we set OMP_NUM_THREADS to, so that it is not taken for the operator's
SPINS = 2000  # about 30 us: bridges the gap between two regions, and yields soon where cores are shared


def spin_briefly() -> None:
    """Call before torch is imported. An own GOMP_SPINCOUNT or OMP_WAIT_POLICY is left alone."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def hold_to_quota() -> None:
    """Call before torch is imported, which would start a thread for each core: beyond its quota the kernel
    stops a container for the rest of each 100 ms. An own OMP_NUM_THREADS is left alone.
    """
    cpus = usable_cpus()
    if OMP_THREADS not in os.environ and cpus < affinity():
        os.environ[OMP_THREADS] = os.environ[_OWN_CHOICE] = str(min(cpus, physical_cores()))


def operator_chose_threads() -> bool:
    """Whether OMP_NUM_THREADS says what the operator, or the process that started this one, wants."""
    told = os.environ.get(OMP_THREADS)
    return told is not None and told != os.environ.get(_OWN_CHOICE)


def release_compute_threads() -> None:
    """End the calling thread's pool of compute threads; the next parallel region would make a new one."""
    from lora_kernels.native.build import native_build

    library = native_build().library
    if library is not None:
        library.ml_release_threads()
