"""Compiles a Triton kernel for a GPU that is not here, and reads what the assembler made of it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}
SMALLEST_SHARED_LIMIT = 99 * 1024  # L4 and 4090 (sm_89): what we choose is to run there too
TENSOR_CORE = ("HMMA", "HGMMA")
SPILLS = ("STL", "LDL")


@dataclass(frozen=True)
class Compiled:
    """shared_bytes: per program. stack_bytes: local memory per thread. instructions: how often each opcode occurs."""

    shared_bytes: int
    stack_bytes: int
    registers: int
    instructions: Counter[str]

    def count(self, *prefixes: str) -> int:
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefixes))


def compile_for(
    capability: int,
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    divisible: set[str],
    num_warps: int,
    num_stages: int,
    folder: Path,
) -> Compiled:
    """pointers: the types of those arguments that are not int32. divisible: integers that are multiples of 16 (as
    Triton finds them when it launches; pointers always are)."""
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    missing = set(pointers) - set(kernel.arg_names)
    assert not missing, f"no such arguments: {missing}"
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in divisible
    }
    source = ASTSource(kernel, signature, constexprs=dict(constants), attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return read_compiled(compiled, folder)


def read_compiled(compiled: Any, folder: Path) -> Compiled:
    """What `triton.compile` made."""
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    usage = _dump("-res-usage", path)
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", _dump("-sass", path), re.MULTILINE)
    stack, registers = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "REG"))  # type: ignore[index]
    return Compiled(compiled.metadata.shared, stack, registers, Counter(opcodes))


def _dump(option: str, path: Path) -> str:
    return subprocess.run([str(CUOBJDUMP), option, str(path)], capture_output=True, text=True, check=True).stdout
