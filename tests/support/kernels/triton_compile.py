"""Compiles a Triton kernel for a GPU that is not here, and reads what the assembler made of it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

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
    """shared_bytes: per program. stack_bytes: local memory per thread. instructions: how often each opcode occurs.

    loop: the opcodes of the innermost loop with tensor cores, or of the longest one; empty if there is none.
    """

    shared_bytes: int
    stack_bytes: int
    registers: int
    num_warps: int
    instructions: Counter[str]
    loop: Counter[str]

    @property
    def loop_lanes(self) -> int:
        """Lane slots that one pass of the loop takes of a program: instructions times lanes."""
        return 32 * self.num_warps * self.loop.total()

    def loop_of(self, *prefixes: str) -> int:
        """How many of the loop's instructions begin so."""
        return sum(n for opcode, n in self.loop.items() if opcode.startswith(prefixes))

    def programs_per_multiprocessor(self, capability: int = 90) -> int:
        """How many are resident at once, by registers, shared memory and warps."""
        registers = 32 * self.num_warps * -(-self.registers // 8) * 8
        shared = self.shared_bytes + 1024  # the driver's own
        return min(65536 // registers, (SHARED_LIMITS[capability] + 1024) // shared, 64 // self.num_warps)

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
    Triton finds them when it launches; pointers always are). Other arguments that end in `_ptr` are None."""
    absent = [name for name in kernel.arg_names if name.endswith("_ptr") and name not in pointers]
    constants = {**constants, **dict.fromkeys(absent)}
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


def read_compiled(compiled: Any, folder: Path | None = None) -> Compiled:
    """What `triton.compile` made."""
    with TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _dump("-res-usage", path)
        code = _lines(_dump("-sass", path))
    stack, registers = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "REG"))  # type: ignore[index]
    opcodes = Counter(line.opcode for line in code)
    num_warps = compiled.metadata.num_warps
    return Compiled(compiled.metadata.shared, stack, registers, num_warps, opcodes, _hot_loop(code))


class _Line(NamedTuple):
    address: int
    opcode: str
    target: int | None  # of a branch


def _lines(sass: str) -> list[_Line]:
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", sass, re.MULTILINE)
    targets = (re.search(r"0x([0-9a-f]+)\s*$", rest) if opcode.startswith("BRA") else None for _, opcode, rest in lines)
    return [
        _Line(int(address, 16), opcode, int(target[1], 16) if target else None)
        for (address, opcode, _), target in zip(lines, targets, strict=True)
    ]


def _hot_loop(code: list[_Line]) -> Counter[str]:
    bodies = [
        Counter(line.opcode for line in code if last.target <= line.address <= last.address)
        for last in code
        if last.target is not None and last.target < last.address
    ]
    with_tensor_cores = [body for body in bodies if any(opcode.startswith(TENSOR_CORE) for opcode in body)]
    if with_tensor_cores:
        return min(with_tensor_cores, key=Counter.total)
    return max(bodies, key=Counter.total, default=Counter())


def _dump(option: str, path: Path) -> str:
    return subprocess.run([str(CUOBJDUMP), option, str(path)], capture_output=True, text=True, check=True).stdout
