"""A process that reads an old PEFT's adapter_model.bin and writes its tensors as safetensors. Nothing of it is run.

    python -P -m server.cli.adapters.bin_child SOURCE TARGET

torch's own reader of weights takes tensors alone (`weights_only`) and refuses every other name in the pickle; limits of
the kernel end a process that a crafted file makes use too much. Exit code 0, or 1 with the reason on stdout.
"""

from __future__ import annotations

import re
import resource
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from server.cli.adapters.bin_weights import MAX_CPU_S

_MORE_BYTES = 256 << 20  # of memory, beside four times the file: the tensors, a copy of each, and room
_MAX_REASON_CHARS = 200
_FOREIGN_NAME = re.compile(r"GLOBAL ([\w.]{1,80})")


def convert(source: Path, target: Path) -> str | None:
    """The reason why it holds no adapter's tensors, or None and `target` is written."""
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  the unpickler has no class for what a crafted file makes it raise
        return _short(error)
    if not isinstance(found, dict) or not found:
        return f"it holds a {type(found).__name__}, not tensors by their names"
    odd = next((key for key, value in found.items() if not _is_plain(key, value)), None)
    if odd is not None:
        return f"{str(odd)[:80]!a} is no plain tensor"
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in found.items()}, target)
    return None


def _is_plain(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided


def _short(error: Exception) -> str:
    name = _FOREIGN_NAME.search(str(error))
    if name is not None:
        return f"it names {name[1]}, which is no tensor"
    return f"torch cannot read it: {' '.join(str(error).split())[:_MAX_REASON_CHARS]}"


def _limit(num_bytes: int) -> None:
    with open("/proc/self/statm", encoding="ascii") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * num_bytes + _MORE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * num_bytes + (1 << 20),) * 2)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)  # its signal ends the process


def main() -> int:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    _limit(source.stat().st_size)
    reason = convert(source, target)
    print(reason or "")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
