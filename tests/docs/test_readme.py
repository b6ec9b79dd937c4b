"""README's claims: its table is benchmarks/results, its map is the tree, its numbers are the log's."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.table import PEERS, table_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_the_table_is_the_last_committed_results() -> None:
    assert "\n".join(table_of(RESULTS)) in README, "`python -m benchmarks.table` prints the table"
    files = [RESULTS / f"{name}.csv" for name in PEERS]
    assert all("2 cores, avx2" in file.read_text() for file in files)


def test_every_folder_of_the_map_exists() -> None:
    tree = README.partition("## How it is built")[2].partition("server/\n")[2].partition("```")[0]
    below: dict[int, str] = {-1: "server"}
    for line in tree.splitlines():
        name = re.match(r"( *)([\w]+)/", line)
        if name is None or len(name[1]) > 4:
            continue
        depth = len(name[1]) // 2
        parent = below[0] if depth == 2 else below[-1]
        folder = f"{parent}/{name[2]}" if depth else name[2]
        if depth == 1:
            below[0] = folder
        assert (ROOT / folder).is_dir(), folder


def test_the_promises_name_tests_that_exist() -> None:
    table = README.partition("## What is promised")[2].partition("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)`", row)
        assert named, row
        assert all((ROOT / path).is_file() for path in named), row


def test_sentences_are_short() -> None:
    """Twenty words on average, code and tables left out."""
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#", "!")))
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    sentences = [part for part in re.split(r"(?<=[.!?:;])\s+|\n\s*(?:- |\n)", text) if len(part.split()) > 1]
    words = sum(len(part.split()) for part in sentences)
    assert words / len(sentences) <= 20, words / len(sentences)
