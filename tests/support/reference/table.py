"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; columns that hold nothing in any row are left out."""
    rows = list(rows)
    kept = [index for index in range(len(heads)) if index == 0 or any(row[index] for row in rows)]
    lines = [[heads[index] for index in kept], ["---"] * len(kept)]
    lines += [[row[index] for index in kept] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
