"""`adapter push` of an old PEFT's adapter_model.bin: its tensors as safetensors, made in a process of its own (see
`bin_child`). Knows no store; the server itself never opens a pickle.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters_store.errors import AdapterRejected
from adapters_store.parsing.adapter_files import WEIGHTS_FILE

MAX_CPU_S = 120.0


@contextmanager
def as_safetensors(weights: Path, spool: Path) -> Iterator[Path]:
    """The weights themselves, or those of a .bin in a new file under `spool` that is gone at the end of the block.

    Raises AdapterRejected: pickle.
    """
    if weights.suffix != ".bin":
        yield weights
        return
    with tempfile.TemporaryDirectory(prefix="import-", dir=spool) as folder:
        target = Path(folder) / WEIGHTS_FILE
        _convert(weights, target)
        yield target


def _convert(source: Path, target: Path) -> None:
    command = [sys.executable, "-P", "-m", "server.cli.adapters.bin_child", str(source.absolute()), str(target)]
    child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={}, check=False)
    if child.returncode == 0:
        return
    reason = child.stdout.strip() or f"reading it took more than {MAX_CPU_S:g} s of processor time, or too much memory"
    message = (
        f"{source.name}: {reason}; nothing of it was run; save the adapter again with today's PEFT (save_pretrained)"
    )
    raise AdapterRejected("pickle", message, param="weights")
