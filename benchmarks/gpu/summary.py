"""The suite's short table, its plots and its one JSON file, from whatever parts are done. Measures nothing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.shapes import RANK
from benchmarks.gpu.parts import PARTS, result_of
from benchmarks.gpu.sizes import FULL
from benchmarks.gpu.targets import SHARE_OF_FLOOR, nf4_target, of_bare_target

Results = dict[str, dict[str, Any]]
Line = tuple[str, str, str]  # measure, to reach, measured
NOT_RUN = "not run"


def results(out: Path, *, toy: bool) -> Results:
    """By part, in the suite's order."""
    found = {name: result_of(out, name, toy=toy) for name in PARTS}
    return {name: result for name, result in found.items() if result is not None}


def write(out: Path, found: Results, *, toy: bool) -> Path:
    """All rows of all parts in one file."""
    path = out / f"gpu_suite{'-toy' if toy else ''}.json"
    path.write_text(json.dumps(found, indent=1))
    return path


def table(found: Results) -> str:
    """What was to be reached, and what was measured."""
    lines: list[Line] = [("measure", "to reach", "measured"), *_lines(found)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def wrong_cases(found: Results) -> list[str]:
    """Correctness cases that failed."""
    return [str(row["case"]) for row in _rows(found, "correctness") if not row["ok"]]


def _rows(found: Results, part: str, **wanted: object) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = found.get(part, {}).get("rows", [])
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _lines(found: Results) -> Iterator[Line]:
    cases = _rows(found, "correctness")
    failed = wrong_cases(found)
    measured = f"{len(cases) - len(failed)} of {len(cases)}" if cases else NOT_RUN
    if found.get("correctness", {}).get("cut_off"):
        measured += ", cut off"
    yield "operations that equal their reference", "all", measured
    yield "LoRA at decode: bytes / time / bandwidth", ">= 0.6", _lora(found)
    yield "LoRA in one launch / two, up to 8 rows", "", _beside(found, "lora", "one_launch", is_inverse=True)
    yield "one_launch.max_bytes that these say", "", _max_bytes(found)
    yield "LoRA, expand started early / not", "", _beside(found, "lora", "overlapped", is_inverse=True)
    for count in (32, 64):
        kept = _one(found, "model", "of_bare", kind="decode", rows=count, adapters=count)
        yield f"bf16 decode, {count} rows on {count} r{RANK} / bare", of_bare_target(FULL, count, count), kept
    for count in (1, 32):
        share = _one(found, "model", "of_floor", kind="decode", rows=count, adapters=0)
        yield f"bf16 bare decode, {count} rows / floor", f">= {SHARE_OF_FLOOR}", share
    yield "prefill, 8 adapters / bare", ">= 0.88", _one(found, "model", "of_bare", kind="prefill", adapters=8)
    yield "NF4 step / bf16 step, 1 and 8 rows", nf4_target(FULL, 8), _nf4(found)
    yield "paged attention / SDPA, decode", "", _beside(found, "attention", "sdpa", kind="decode")
    yield "paged attention / SDPA, prefill", "", _beside(found, "attention", "sdpa", kind="prefill")
    yield "activation from host memory, ms", "< 4", _one(found, "model", "ms", **{"from": "host memory"})
    yield "activation from disk, ms", "< 40", _one(found, "model", "ms", **{"from": "disk (page cache)"})
    yield "others' p95 latency in a load storm", "<= 1.1", _one(found, "model", "storm_over_quiet", kind="storm")
    yield "ours / PEFT generate, 32 rows, distinct", "", _peft(found)
    for way in dict.fromkeys(row["way"] for row in _rows(found, "others") if row["way"] != "ours"):
        yield f"LoRA kernels / {way}'s", "", _beside(found, "others", way)


def _one(found: Results, part: str, column: str, **wanted: object) -> str:
    rows = _rows(found, part, **wanted)
    return f"{rows[0][column]:.3g}" if rows else NOT_RUN


def _lora(found: Results) -> str:
    """Over the cases whose bytes take longer than launches do."""
    shares = [row["of_bandwidth"] for row in _rows(found, "lora", way="ours") if row["mb"] > 5 and row["rows"] <= 64]
    return f"{statistics.median(shares):.2f} ({min(shares):.2f}..{max(shares):.2f})" if shares else NOT_RUN


def _nf4(found: Results) -> str:
    ratios = []
    for rows in (1, 8):
        packed = _rows(found, "model_nf4", kind="decode", rows=rows, adapters=0)
        dense = _rows(found, "model", kind="decode", rows=rows, adapters=0)
        if packed and dense:
            ratios.append(f"{packed[0]['step_ms'] / dense[0]['step_ms']:.2f}")
    return ", ".join(ratios) or NOT_RUN


def _max_bytes(found: Results) -> str:
    """Up to the first case that one launch loses."""
    cases = [_case_times(found, "lora", way) for way in ("ours", "one_launch")]
    sizes = {_case(row): row["one_launch_mb"] for row in _rows(found, "lora", way="one_launch")}
    lost = [sizes[key] for key, us in cases[1].items() if us >= cases[0][key]]
    if not sizes:
        return NOT_RUN
    return f"{min(lost) * 1e6:.0f}" if lost else f"all of {max(sizes.values()) * 1e6:.0f} and fewer win"


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("model", "group", "rows", "adapters", "ranks", "kind", "new", "context")
    return tuple(row.get(name) for name in names)


def _case_times(found: Results, part: str, way: str, **wanted: object) -> dict[tuple[Any, ...], float]:
    return {_case(row): row["us"] for row in _rows(found, part, way=way, **wanted) if "us" in row}


def _beside(found: Results, part: str, other: str, *, is_inverse: bool = False, **wanted: object) -> str:
    """How many times as fast ours is (is_inverse: the other), over the cases that both ran."""
    ours, theirs = (_case_times(found, part, way, **wanted) for way in ("ours", other))
    ratios = [ours[key] / theirs[key] if is_inverse else theirs[key] / ours[key] for key in theirs if key in ours]
    if not ratios:
        return NOT_RUN
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f}) times as fast"


def _peft(found: Results) -> str:
    ours = _rows(found, "model", kind="decode", rows=32, adapters=32)
    theirs = [row for row in _rows(found, "peft", kind="peft", rows=32) if row["adapters"]]
    return f"{ours[0]['tok_per_s'] / theirs[0]['tok_per_s']:.1f}" if ours and theirs else NOT_RUN


def plot(out: Path, found: Results, say: Callable[[str], None]) -> None:
    """Share of the bandwidth by operation and size; a missing matplotlib gives a message only."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("matplotlib is not installed: no plots")
        return
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, (title, points) in zip(panels, _panels(found).items(), strict=True):
        labels, shares = list(points), list(points.values())
        panel.barh(range(len(labels)), shares, color="#2f6fb0")
        panel.set_yticks(range(len(labels)), labels, fontsize=6)
        panel.set_title(title, fontsize=9, loc="left")
        panel.set_xlim(0, max([1.0, *shares]))
    path = out / "gpu_suite.png"
    figure.savefig(path, dpi=130)
    say(f"wrote {path}")


def _panels(found: Results) -> dict[str, dict[str, float]]:
    lora = {
        f"{row['model']} {row['group']} {row['rows']}x{row['adapters']} r{row['ranks']}": row["of_bandwidth"]
        for row in _rows(found, "lora", way="ours")
        if row["mb"] > 5
    }
    nf4 = {f"{row['layer']} {row['rows']} {row['way']}": row["of_bandwidth"] for row in _rows(found, "nf4")}
    decode = {
        f"{row['base']} {row['rows']} rows, {row['adapters']} adapters": row["of_floor"]
        for part in ("model", "model_nf4")
        for row in _rows(found, part, kind="decode")
    }
    return {
        "LoRA: share of bandwidth": dict(list(lora.items())[:40]),
        "linear layers: share of bandwidth": nf4,
        "decode step: floor / time": decode,
    }
