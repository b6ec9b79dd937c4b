"""Compiles kernels.c for this machine, once, into the user's cache folder. Knows compilers; knows no tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCES = (Path(__file__).with_name("kernels.c"), *sorted(Path(__file__).parent.rglob("*.h")))
FLAGS = ("-O2", "-march=native", "-fopenmp", "-fno-math-errno", "-ffp-contract=off", "-shared", "-fPIC")


@dataclass(frozen=True, slots=True)
class NativeBuild:
    """The loaded library, or the reason why there is none (torch then serves, slower)."""

    library: ctypes.CDLL | None
    reason: str


def cache_dir() -> Path:
    """Raises OSError if XDG_CACHE_HOME is not set and the user has no home folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "multilora"
    except RuntimeError as error:
        raise OSError("no folder for the cache: set XDG_CACHE_HOME, or HOME") from error


@cache
def native_build() -> NativeBuild:
    """Compile (3 to 8 s of one core, the first time only) and load. MULTILORA_NATIVE=off disables the C kernels."""
    if os.environ.get("MULTILORA_NATIVE", "on") == "off":
        return NativeBuild(None, "MULTILORA_NATIVE=off")
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return NativeBuild(None, "no C compiler found (cc, gcc or $CC)")
    try:
        path = _compiled(compiler)
        return NativeBuild(ctypes.CDLL(str(path)), f"compiled by {compiler}")
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        return NativeBuild(None, f"{compiler} could not build the C kernels: {str(detail).strip()[:400]}")


def _compiled(compiler: str) -> Path:
    target = cache_dir() / f"kernels-{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        command = [compiler, *FLAGS, "-o", str(built), str(SOURCES[0]), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        built.replace(target)  # atomic, even if two processes build at once
    return target


def _fingerprint(compiler: str) -> str:
    """Changes with the sources, the flags, the compiler and the CPU's instruction sets (-march=native)."""
    parts = [source.read_bytes() for source in SOURCES]
    parts += [" ".join(FLAGS).encode(), compiler.encode(), platform.machine().encode(), _cpu_flags()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu_flags() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "").encode()
