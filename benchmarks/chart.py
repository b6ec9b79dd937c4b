"""The chart of README: tokens per second beside each peer, from the committed results `versus_*.csv`. Measures nothing.

`make chart` writes docs/images/speed.svg. Its colours follow the reader's light or dark scheme. Results of a machine
whose cores were busy (`_busy`) and times of prompts are left out; they are in the log.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.common.report import DEFAULT_OUT

CHART = Path("docs/images/speed.svg")
WIDTH, LEFT, RIGHT, MARGIN = 760, 210, 130, 20  # pixels
ROW, BAR, HEAD = 34, 12, 52
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 11px; fill: #59636e }
.title { font-size: 15px; font-weight: 600 } .times { font-size: 15px; font-weight: 600; text-anchor: end }
.card { fill: #ffffff; stroke: #d0d7de } .ours { fill: #2f6fb0 } .theirs { fill: #c9802f }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .small { fill: #9198a1 } .card { fill: #0d1117; stroke: #30363d }
.ours { fill: #58a6ff } .theirs { fill: #d29922 } }"""


@dataclass(frozen=True, slots=True)
class Case:
    """One load on both sides, in tokens per second."""

    name: str
    ours: float
    theirs: float
    times: float


@dataclass(frozen=True, slots=True)
class Peer:
    """All loads measured beside one peer, in one run."""

    name: str
    machine: str
    day: str
    cases: list[Case]


def peers_of(folder: Path) -> list[Peer]:
    """Those with results in `folder`, PEFT first."""
    files = [path for path in sorted(folder.glob("versus_*.csv")) if "_busy" not in path.stem]
    files.sort(key=lambda path: path.stem != "versus_peft")
    return [peer for path in files if (peer := peer_of(path)).cases]


def peer_of(path: Path) -> Peer:
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("unit", "tok/s") == "tok/s"]
    if path.stem == "versus_peft":
        return Peer("PEFT", *_run_of(rows), [_case_beside_peft(row) for row in rows])
    cases = [Case(r["load"], float(r["ours"]), float(r["theirs"]), float(r["times_as_fast"])) for r in rows]
    return Peer(rows[0]["peer"] if rows else path.stem, *_run_of(rows), cases)


def _run_of(rows: Sequence[dict[str, str]]) -> tuple[str, str]:
    return (rows[0]["hardware"], rows[0]["date"].split(" ")[0]) if rows else ("", "")


def _case_beside_peft(row: dict[str, str]) -> Case:
    adapters = int(row["adapters"])
    on = "base alone" if adapters == 0 else "1 adapter" if adapters == 1 else f"{adapters} adapters"
    return Case(
        f"{row['batch']} requests, {on}",
        float(row["ours_tok_per_s"]),
        float(row["theirs_tok_per_s"]),
        float(row["ours_over_theirs"]),
    )


def drawn(peers: Sequence[Peer]) -> str:
    """The chart as SVG."""
    height = MARGIN + sum(HEAD + ROW * len(peer.cases) for peer in peers)
    spoken = "; ".join(f"{peer.name}: {case.name}, {case.times:.1f} times" for peer in peers for case in peer.cases)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(f"Tokens per second beside {spoken}", {chr(34): "&quot;"})}">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>',
    ]
    top = 0
    for peer in peers:
        parts += _panel(peer, top)
        top += HEAD + ROW * len(peer.cases)
    return "\n".join([*parts, "</svg>", ""])


def _panel(peer: Peer, top: int) -> Iterator[str]:
    fastest = max(max(case.ours, case.theirs) for case in peer.cases)
    yield _text(MARGIN, top + 26, f"Tokens per second beside {peer.name}", "title")
    yield _text(MARGIN, top + 42, f"upper bar: multilora, lower bar: {peer.name}. {peer.machine}, {peer.day}", "small")
    for number, case in enumerate(peer.cases):
        y = top + HEAD + ROW * number
        yield _text(MARGIN, y + BAR + 4, case.name)
        for kind, speed, at in (("ours", case.ours, y), ("theirs", case.theirs, y + BAR + 1)):
            width = max(1, round((WIDTH - LEFT - RIGHT) * speed / fastest))
            yield f'<rect class="{kind}" x="{LEFT}" y="{at}" width="{width}" height="{BAR}" rx="2"/>'
            yield _text(LEFT + width + 6, at + BAR - 2, f"{speed:.0f}", "small")
        yield _text(WIDTH - MARGIN, y + BAR + 5, f"{case.times:.1f}x", "times")


def _text(x: int, y: int, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(text)}</text>'


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chart", description=__doc__)
    parser.add_argument("--results", type=Path, default=DEFAULT_OUT, metavar="DIR")
    parser.add_argument("--out", type=Path, default=CHART, metavar="FILE")
    options = parser.parse_args(None if arguments is None else list(arguments))
    options.out.write_text(drawn(peers_of(options.results)))
    print(options.out)


if __name__ == "__main__":
    main()
