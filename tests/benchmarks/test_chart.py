"""README's chart says what the committed results say, and reads the results of peers that come later."""

from __future__ import annotations

import csv
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.chart import CHART, drawn, main, peers_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = 'llama <server> & "co"'


def texts_of(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_committed_chart_shows_the_committed_results() -> None:
    """Of each peer that it names; `make chart` adds those that have results since."""
    chart = (ROOT / CHART).read_text()
    shown = [peer for peer in peers_of(RESULTS) if f"Tokens per second beside {peer.name}" in texts_of(chart)]
    assert shown
    assert drawn(shown) == chart


def test_results_of_another_peer_are_read_but_not_prompts_nor_a_busy_machine(tmp_path: Path) -> None:
    row = {"load": "8 clients, 8 adapters", "ours": 30, "theirs": 12.4, "times_as_fast": 2.42, "unit": "tok/s"}
    row |= {"peer": HOSTILE, "hardware": "2 cores", "date": "2026-11-29 12:00 UTC"}
    prompt = row | {"load": "a prompt", "unit": "ms"}
    for name, rows in (("versus_peer", [row, prompt]), ("versus_peer_busy1", [row | {"peer": "busy"}])):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerows(rows)
    main(["--results", str(tmp_path), "--out", str(tmp_path / "chart.svg")])
    found = texts_of((tmp_path / "chart.svg").read_text())
    assert found == [
        f"Tokens per second beside {HOSTILE}",
        f"upper bar: multilora, lower bar: {HOSTILE}. 2 cores, 2026-11-29",
        "8 clients, 8 adapters",
        "30",
        "12",
        "2.4x",
    ]
