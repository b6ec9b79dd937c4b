"""What a process says of its memory is its own."""

from __future__ import annotations

import subprocess
import sys

from trainer.model.memory import is_out_of_memory

OWN = "import torch; from trainer.model.memory import peak_bytes; print(peak_bytes(torch.device('cpu')))"
PARENT = f"""
import subprocess, sys
held = b"x" * (1 << 30)
own = subprocess.run([sys.executable, "-c", {OWN!r}], check=True, capture_output=True, text=True)
print(own.stdout, len(held))
"""


def test_a_peak_does_not_count_what_the_starting_process_held() -> None:
    """The kernel's `getrusage` does, so a training that a large server starts would report the server's gigabytes."""
    done = subprocess.run([sys.executable, "-c", PARENT], check=True, capture_output=True, text=True)
    peak, held = (int(word) for word in done.stdout.split())
    assert held == 1 << 30
    assert 1 << 26 < peak < 1 << 30


def test_cuda_says_in_words_alone_that_memory_is_out() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(ValueError("CUDA error: out of memory"))
