"""Settings of the whole process that must precede torch: compute threads, oneDNN's caches, the C library's arenas.

Imports no torch. An operator's own environment variable always wins.

Threads: a decode step is about a hundred parallel regions, 10 to 30 us apart. libgomp's threads spin between regions
only while the process has no more compute threads than cores. A second pool (a loader's, a main thread's) makes every
region end in a sleep and a wake-up: a decode step of 10 ms became 15. So only the engine's thread may keep a pool.

Primitives: oneDNN keeps the code it compiled for every shape of a bf16 product, and torch's layer above it (ideep)
keeps the description as well: half a megabyte or more together, for 1,024 shapes each. A prefill step has any number of
tokens and five shapes of weights, so a server grew for hours, towards 740 MB. Compiling again takes 0.15 ms a shape,
which does not show in prefill steps (benchmarks/op_primitives.py).

GPU memory: torch's allocator keeps segments of the sizes that were asked for, and prompts of varied lengths leave holes
between them. Segments that grow and shrink (`expandable_segments`) leave none; it is chosen before CUDA starts.

Arenas: glibc gives every thread an arena, up to eight per core, and an arena never shrinks by itself: under a mixed
load a server grew by a megabyte a minute while its memory in use stayed the same. A training allocates its activations
in one thread and frees them beside gradients of another: what arenas keep made its peak half as large again.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lora_kernels.cgroups import affinity, physical_cores, usable_cpus

OMP_THREADS = "OMP_NUM_THREADS"
_OWN_CHOICE = "MULTILORA_OMP_NUM_THREADS"  # the value this process gave OMP_NUM_THREADS, so it is not the operator's
SPINS = 2000  # about 30 us: bridges the gap between two regions, and yields soon if cores are shared
PRIMITIVE_CACHES = {  # 0.6 MB an entry; ideep's own cache saves nothing
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "1",
}
NO_COMPILER = "TORCHDYNAMO_DISABLE"
ALLOCATOR = "PYTORCH_ALLOC_CONF"
ALLOCATOR_BEFORE = "PYTORCH_CUDA_ALLOC_CONF"  # its older name, which torch reads too
MAX_ARENAS = 4
MAPPED_BYTES = 1 << 20
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3  # malloc.h
_PR_SET_PDEATHSIG = 1


def spin_briefly() -> None:
    """Call before torch is imported. GOMP_SPINCOUNT and OMP_WAIT_POLICY are left alone if they are set."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def hold_to_quota() -> None:
    """Call before torch is imported: it would start a thread for each core, and the kernel stops a container that is
    beyond its quota for the rest of each 100 ms. OMP_NUM_THREADS is left alone if it is set.
    """
    cpus = usable_cpus()
    if OMP_THREADS not in os.environ and cpus < affinity():
        os.environ[OMP_THREADS] = os.environ[_OWN_CHOICE] = str(min(cpus, physical_cores()))


def operator_chose_threads() -> bool:
    """Whether the operator, or the parent process, set OMP_NUM_THREADS."""
    value = os.environ.get(OMP_THREADS)
    return value is not None and value != os.environ.get(_OWN_CHOICE)


def release_compute_threads() -> None:
    """End the calling thread's pool of compute threads; the next parallel region would make a new one."""
    from lora_kernels.native.build import native_build

    library = native_build().library
    if library is not None:
        library.ml_release_threads()


def keep_few_primitives() -> None:
    """Call before torch's first product. Each variable is left alone if it is set."""
    for name, capacity in PRIMITIVE_CACHES.items():
        os.environ.setdefault(name, capacity)


def compile_nothing() -> None:
    """Call before bitsandbytes is imported: it asks torch to compile functions that nothing here calls, and the
    compiler's import alone costs 2.7 s of CPU. TORCHDYNAMO_DISABLE is left alone if it is set."""
    os.environ.setdefault(NO_COMPILER, "1")


@contextmanager
def unscanned_imports() -> Iterator[None]:
    """Imports leave no garbage, and scans for it while they grow are a fifth of a start: there are none inside."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def end_with_parent() -> None:
    """From now on Linux kills this process when its parent ends, however it ends."""
    control_process = _glibc_function("prctl")
    if control_process is not None:
        control_process(_PR_SET_PDEATHSIG, signal.SIGKILL)


def grow_gpu_segments() -> None:
    """Call before CUDA starts. Both variables are left alone if one is set."""
    if ALLOCATOR not in os.environ and ALLOCATOR_BEFORE not in os.environ:
        os.environ[ALLOCATOR] = "expandable_segments:True"


def share_arenas() -> None:
    """All threads started from now on share MAX_ARENAS. MALLOC_ARENA_MAX wins if it is set."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        _set_malloc_option(_M_ARENA_MAX, MAX_ARENAS)


def map_large_blocks() -> None:
    """Blocks of MAPPED_BYTES and more go back to the system when freed. MALLOC_MMAP_THRESHOLD_ wins if it is set.

    glibc would raise that threshold to 32 MiB as it goes, and keep a training's freed activations in its arenas.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _set_malloc_option(_M_MMAP_THRESHOLD, MAPPED_BYTES)


def _set_malloc_option(option: int, value: int) -> None:
    set_option = _glibc_function("mallopt") if c_library_trim() is not None else None  # other libraries' differ
    if set_option is not None:
        set_option(option, value)


def c_library_trim() -> Callable[[], object] | None:
    """glibc's malloc_trim(0), which gives free memory inside the arenas back; 1 to 2 ms. None for another C library."""
    trim = _glibc_function("malloc_trim")
    return None if trim is None else lambda: trim(ctypes.c_size_t(0))


def _glibc_function(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return found
