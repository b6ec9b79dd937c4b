"""(g) Other projects' LoRA kernels beside ours: same rows, adapters and clock, each compared with the reference first.

Which projects: checkouts named by `--others`. Projects that fail or are wrong are skipped and named.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from benchmarks.common.arena import SCALE
from benchmarks.common.lora_ops import LoraCase, native
from benchmarks.gpu.bench import Bench, Call, Row
from benchmarks.gpu.lora_part import Case, Prepared, arena_elements, calls_of, cases, prepare
from benchmarks.gpu.others import ways_of
from benchmarks.gpu.others.job import Job, MakeCalls
from benchmarks.gpu.sizes import sizes_for
from lora_kernels.check_cases import relative_error
from lora_kernels.lora.batch import LoraBatch
from lora_kernels.lora.reference import lora_delta_reference

LIMIT = 2**-5  # projects round h differently; more than this is another result


def run(bench: Bench) -> list[Row]:
    """One row per case and way; one that is left out has the reason instead of a time."""
    ways: dict[str, MakeCalls] = {"ours": _ours}
    for path in bench.others:
        ways |= ways_of(path, bench.say)
    sizes = sizes_for(toy=bench.toy)
    dtype = torch.float16 if bench.toy else torch.bfloat16  # the interpreter multiplies bfloat16's bits as integers
    arena = bench.normal(arena_elements(sizes), scale=0.02, dtype=dtype)
    rows: list[Row] = []
    for case in cases(sizes):
        if not case.is_beside_others:
            continue
        if bench.seconds_left < 5:
            bench.say("others: out of time, the rest is left out")
            break
        prepared = prepare(bench, case, arena, sizes)
        rows += [_measured(bench, case, prepared, name, make) for name, make in ways.items()]
    left_out = Counter(f"{row['way']}: left out, {row['left_out']}" for row in rows if "left_out" in row)
    for reason, count in left_out.items():
        bench.say(f"{reason} ({count} cases)")
    return rows


def _measured(bench: Bench, case: Case, prepared: Prepared, name: str, make: MakeCalls) -> Row:
    row: Row = {"model": case.model, "group": case.group, "rows": case.rows, "adapters": case.adapters}
    row |= {"ranks": case.ranks, "way": name}
    job = Job(case.shape, case.slots(), prepared.adapters, prepared.inputs, prepared.outputs, SCALE)
    try:
        calls = make(job)
        error = _error(case, prepared, calls[0])
        if not error <= LIMIT:
            return row | {"left_out": f"wrong by {error:.2g} of the largest value, {LIMIT:.2g} allowed"}
        return row | {"error": error, "us": 1e6 * bench.seconds(calls)}
    except Exception as error:  # noqa: BLE001  theirs may fail as they like; the other ways are worth knowing
        return row | {"left_out": f"{type(error).__name__}: {error}".partition("\n")[0][:300]}


def _ours(job: Job) -> list[Call]:
    return calls_of(native(LoraCase(job.adapters, job.slots, rows_per_request=1)), job.inputs, job.outputs)


def _error(case: Case, prepared: Prepared, call: Call) -> float:
    """Of the first layer's delta, onto zeros."""
    x, y = prepared.inputs[0], prepared.outputs[0]
    batch = LoraBatch(prepared.adapters.table, np.array(case.slots(), dtype=np.int32))
    y.zero_()
    call()
    return relative_error(y, lora_delta_reference(x, batch, prepared.adapters.groups[0][0]))
