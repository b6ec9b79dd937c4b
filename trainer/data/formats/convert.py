"""A file as people have it to the JSON lines that a run reads, with a report of what was recognised and changed.

check_file(path, ...) -> Report            convert(path, target, ...) -> Report
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np

from trainer.data.examples import DIGEST_BYTES
from trainer.data.formats.shapes import PAIRS, ROLES, as_example
from trainer.data.formats.sources import SourceLimits, opened
from trainer.data.jsonl import DataLimits
from trainer.data.problems import DataRejected, LineRefused, Problem, ProblemList, excerpt_of_bytes
from trainer.data.records import parse_object, parse_record


@dataclass
class Report:
    """container: what the file is. shapes: examples of each shape. notes: changes and how often. problems: the first of
    the refused lines; counts: all of them, by code. num_duplicates: examples that repeat an earlier one."""

    container: str = ""
    shapes: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    num_examples: int = 0
    num_duplicates: int = 0
    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, error: DataRejected) -> Self:
        """Of a file that could not be read at all."""
        return cls("not recognised", problems=error.problems, counts=error.counts)

    @property
    def is_usable(self) -> bool:
        """Whether a run takes the file: no line is refused, and the distinct examples are enough."""
        return not self.problems and self.num_examples - self.num_duplicates >= DataLimits().min_examples

    @property
    def text(self) -> str:
        """ "Alpaca in a JSON list: 120 examples; key 'id' left out (120)"."""
        shapes = ", ".join(f"{shape} ({count})" for shape, count in self.shapes.most_common())
        notes = "".join(f"; {note} ({count})" for note, count in self.notes.most_common())
        return f"{self.container}, {self.num_examples} examples: {shapes or 'none recognised'}{notes}"

    def to_mapping(self) -> dict[str, Any]:
        return {
            "container": self.container,
            "shapes": dict(self.shapes),
            "notes": dict(self.notes),
            "num_examples": self.num_examples,
            "num_duplicates": self.num_duplicates,
            "num_refused": sum(self.counts.values()),
            "counts": self.counts,
            "problems": [asdict(problem) for problem in self.problems],
        }


def check_file(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    target: Path | None = None,
    sources: SourceLimits | None = None,
    limits: DataLimits | None = None,
    what: str = "data",
) -> Report:
    """What the file holds, refused lines included; with a target, the examples are written there as JSON lines.

    columns: which column is what, for ROLES. Raises DataRejected if no record can be read at all; OSError.
    """
    sources, limits = sources or SourceLimits(), limits or DataLimits()
    with opened(path, sources, what=what) as (container, records), _written(target) as stream:
        checking = _Checking(Report(container), dict(columns or {}), limits, what)
        for body in checking.examples(records):
            if stream is not None:
                stream.write(json.dumps(body, ensure_ascii=False) + "\n")
    return checking.done()


def convert(path: Path, target: Path, *, what: str = "data", **options: Any) -> Report:
    """The same, for a file that must be right as a whole. Raises DataRejected with every refused line counted."""
    report = check_file(path, target=target, what=what, **options)
    if report.problems:
        raise DataRejected(report.problems, report.counts, what=what)
    if not report.num_examples:
        raise DataRejected([Problem(0, "too_few_examples", "the file holds no example")], what=what)
    return report


def columns_of(text: str) -> dict[str, str]:
    """ "user=question,assistant=answer" -> columns. Raises ValueError with what is wrong."""
    columns: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        role, separator, column = part.partition("=")
        if role not in ROLES or not separator or not column or role in columns:
            raise ValueError(f"{part!r} is not ROLE=COLUMN with a role of {', '.join(ROLES)}, each once")
        columns[role] = column
    if columns and not {"user", "assistant"} <= columns.keys():
        raise ValueError("a column for user and one for assistant are needed")
    return columns


def _written(target: Path | None) -> AbstractContextManager[TextIO | None]:
    return nullcontext() if target is None else target.open("w", encoding="utf-8")


@dataclass
class _Checking:
    """One pass over a file."""

    report: Report
    columns: dict[str, str]
    limits: DataLimits
    what: str
    problems: ProblemList = field(init=False)
    digests: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.problems = ProblemList(what=self.what, max_problems=self.limits.max_problems)

    def examples(self, records: Iterator[tuple[int, bytes]]) -> Iterator[dict[str, Any]]:
        """The bodies of the examples that can be used."""
        for number, raw in records:
            try:
                yield self._example(raw)
            except LineRefused as error:
                self.problems.add(error.at(number))
            if self.report.num_examples > self.limits.max_examples:
                message = f"more than {self.limits.max_examples} examples"
                self.problems.add(Problem(number, "too_many_examples", message))
                return

    def _example(self, raw: bytes) -> dict[str, Any]:
        example = as_example(self._parsed(raw), self.columns)
        record = parse_record(json.dumps(example.body, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        self.digests += record.digest()
        self.report.num_examples += 1
        self.report.shapes[example.shape] += 1
        self.report.notes.update(set(example.notes))
        return example.body

    def _parsed(self, raw: bytes) -> dict[str, Any]:
        if len(raw) > self.limits.max_line_bytes:
            message = f"the record is longer than {self.limits.max_line_bytes} bytes"
            raise LineRefused("line_too_long", message, excerpt=excerpt_of_bytes(raw))
        return parse_object(raw)

    def done(self) -> Report:
        num_pairs = sum(count for shape, count in self.report.shapes.items() if shape.startswith(PAIRS))
        if 0 < num_pairs < self.report.num_examples:
            message = f"{num_pairs} of {self.report.num_examples} lines are preference pairs (chosen and rejected)"
            self.problems.add(Problem(0, "preference_data", f"{message}; a run trains on pairs alone or on none"))
        self.report.problems, self.report.counts = self.problems.listed, dict(self.problems.counts)
        distinct = np.unique(np.frombuffer(self.digests, dtype=f"S{DIGEST_BYTES}"))
        self.report.num_duplicates = self.report.num_examples - len(distinct)
        return self.report
