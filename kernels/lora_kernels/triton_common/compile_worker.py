"""The process that compiles: `python -m lora_kernels.triton_common.compile_worker`, started by `compile_ahead`.

Reads pickled jobs from its parent's pipe; writes what failed to stdout. Needs no GPU, and uses none.
"""

from __future__ import annotations

import base64
import importlib
import json
import pickle
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_kernels.triton_common.compile_ahead import Job


def main() -> None:
    jobs: list[Job] = pickle.loads(base64.b64decode(sys.stdin.buffer.read()))
    failures = {}
    for job in jobs:
        try:
            compile_one(job)
        except Exception as error:  # noqa: BLE001  a compiler may raise anything; the parent reports it
            failures[f"{job.module}.{job.name}"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    print(json.dumps(failures))


def compile_one(job: Job) -> None:
    """Into Triton's cache, under the key that the launch itself will look for."""
    kernel = getattr(importlib.import_module(job.module), job.name)
    source = ASTSource(kernel, dict(job.signature), constexprs=dict(job.constants), attrs=dict(job.attributes))
    triton.compile(source, target=GPUTarget(*job.target), options=dict(job.options))


if __name__ == "__main__":
    main()
