"""README's table: ours beside vLLM and llama-server, from the committed results `versus_*.csv`. Measures nothing.

`python -m benchmarks.table` prints its lines; a test holds README to them. A ratio in bold is a peer's win.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common.report import DEFAULT_OUT
from benchmarks.peers.loads import FULL_LOADS

PEERS = ("versus_vllm", "versus_llama_server")


def table_of(folder: Path) -> list[str]:
    """Markdown lines: head, rule, then a line for each load that was measured beside a peer."""
    measured = {name: _rows(folder / f"{name}.csv") for name in PEERS}
    names = {name: next(iter(rows.values()))["peer"] for name, rows in measured.items()}
    head = ["through HTTP", *(f"multilora / {names[name]} | times as fast" for name in PEERS)]
    lines = [_line(head), _line(["---", *["---"] * 2 * len(PEERS)])]
    for load in FULL_LOADS:
        cells = [cell for name in PEERS for cell in _cells(measured[name].get(load.name))]
        if any(cells):
            lines.append(_line([f"{load.name}, {'ms' if load.is_prompt else 'tok/s'}", *cells]))
    return lines


def _rows(file: Path) -> dict[str, dict[str, str]]:
    with file.open(newline="") as source:
        return {row["load"]: row for row in csv.DictReader(source)}


def _cells(row: dict[str, str] | None) -> list[str]:
    if row is None:
        return ["", ""]
    times = f"{float(row['times_as_fast']):.2f}"
    values = [float(row[side]) for side in ("ours", "theirs")]
    return [" / ".join(f"{value:.0f}" for value in values), times if float(times) >= 1.0 else f"**{times}**"]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--results", type=Path, default=DEFAULT_OUT, metavar="DIR")
    options = parser.parse_args(None if arguments is None else list(arguments))
    print("\n".join(table_of(options.results)))


if __name__ == "__main__":
    main()
