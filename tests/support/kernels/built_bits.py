"""What the C kernels compute as built with other flags, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.source_path import SOURCE_PATH


def built_bits(folder: Path, *flags: str, before: str = "") -> str:
    """The digest of `support.kernels.native_bits`, with the instructions of this CPU but for the flags. before: Python
    that the process runs first."""
    compiler = folder / "-".join(("cc", *(flag.strip("-") for flag in flags)))
    compiler.write_text(f'#!/bin/sh\nexec gcc "$@" {" ".join(flags)}\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CC": str(compiler), "XDG_CACHE_HOME": str(folder), "PYTHONPATH": SOURCE_PATH}
    command = [sys.executable, "-c", f"{before}\nfrom support.kernels.native_bits import main\nmain()"]
    done = subprocess.run(command, check=False, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
