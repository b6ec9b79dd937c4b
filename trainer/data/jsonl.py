"""A training file on disk: checked line by line without holding it in memory. Knows records; knows no tokens.

What stays in memory is one digest a line; records are parsed again when they are encoded.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from trainer.data.examples import DIGEST_BYTES
from trainer.data.problems import DataRejected, LineRefused, Problem, ProblemList, excerpt_of_bytes
from trainer.data.records import Kind, Record, parse_record

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows' editors and spreadsheets begin UTF-8 files with it


@dataclass(frozen=True, kw_only=True)
class DataLimits:
    """Limits of a data file. min_examples: of distinct ones; a line copied ten times is one example.
    max_problems: the problem at which reading ends; None reads on and counts all."""

    min_examples: int = 10
    max_examples: int = 5_000_000
    max_line_bytes: int = 4 << 20
    max_problems: int | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """A file that has passed every check. digest: over the records' contents in order, whatever their spacing.

    num_duplicates: lines that repeat an earlier one. kinds: how many lines of each kind. num_pairs: how many of them
    are preference pairs.
    """

    path: Path
    digest: str
    num_examples: int
    num_duplicates: int
    kinds: dict[Kind, int]
    num_pairs: int
    _digests: bytearray = field(repr=False)

    def records(self) -> Iterator[tuple[int, bytes, Record]]:
        """(line, digest, record) in the file's order. Raises DataRejected(file_changed) if the file is another."""
        index = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                content = _content(number, line)
                if not content.strip():
                    continue
                record = self._same_record(index, number, content)
                yield number, self._digest(index), record
                index += 1
        if index != self.num_examples:
            raise self._changed(0)

    def _digest(self, index: int) -> bytes:
        return bytes(self._digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])

    def _same_record(self, index: int, number: int, line: bytes) -> Record:
        try:
            record = parse_record(line)
        except LineRefused as error:
            raise self._changed(number) from error
        if index >= self.num_examples or record.digest() != self._digest(index):
            raise self._changed(number)
        return record

    def _changed(self, line: int) -> DataRejected:
        return DataRejected([Problem(line, "file_changed", f"{self.path.name} has changed since it was checked")])


def read_jsonl(path: Path, limits: DataLimits | None = None, *, what: str = "data") -> Dataset:
    """Check every line of a JSONL file. what: the field that errors name ("data", "validation", "mix").

    Raises:
        DataRejected: with every problem counted and the first ones listed. Codes: not_utf8, bad_json, duplicate_key,
            nan_literal, too_deep, not_an_object, empty_line, line_too_long, unknown_key, missing_key, wrong_type,
            empty_content, not_unicode, wrong_role, no_assistant, nothing_supervised, bad_weight, too_many_messages,
            unsupported_content, unsupported_tools, too_few_examples, too_many_examples.
        OSError: the file cannot be read.
    """
    reader = _Reader(limits or DataLimits(), what)
    with path.open("rb") as stream:
        reader.read(stream)
    return reader.dataset(path)


def check_pairs(dataset: Dataset, *, wanted: bool, what: str = "data") -> None:
    """A file of preference pairs, and of nothing else, if they are `wanted`; else of none. Raises DataRejected."""
    count, whole = dataset.num_pairs, dataset.num_examples
    if count == (whole if wanted else 0):
        return
    message = f"{count} of {whole} lines are preference pairs (chosen and rejected)"
    if wanted:
        raise DataRejected([Problem(0, "no_preference_data", f"{message}; dpo trains on nothing else")], what=what)
    how = "train them with objective: dpo, through the API with method type dpo"
    raise DataRejected([Problem(0, "preference_data", f"{message}; {how}")], what=what)


def records_at(path: Path, lines: Collection[int]) -> Iterator[Record]:
    """The records on these lines of a file that has passed every check, in the file's order."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number in lines:
                yield parse_record(_content(number, line))


class _Reader:
    """One pass over a file."""

    def __init__(self, limits: DataLimits, what: str) -> None:
        self._limits = limits
        self._problems = ProblemList(what=what, max_problems=limits.max_problems)
        self._hash = hashlib.sha256()
        self._kinds: Counter[Kind] = Counter()
        self._num_pairs = 0
        self._digests = bytearray()

    def read(self, stream: BinaryIO) -> None:
        blank = 0  # blank lines at the end are harmless: one is a problem only if a line follows
        for number, line in enumerate(_lines(stream, self._limits.max_line_bytes), start=1):
            if not _content(number, line).strip():
                blank = blank or number
                continue
            if blank:
                self._problems.add(Problem(blank, "empty_line", "the line is empty"))
                blank = 0
            self._read_line(number, line)
            if self._num_examples > self._limits.max_examples:
                message = f"more than {self._limits.max_examples} examples"
                self._problems.add(Problem(number, "too_many_examples", message))
                return

    def _read_line(self, number: int, line: bytes) -> None:
        if len(line) > self._limits.max_line_bytes:
            message = f"the line is longer than {self._limits.max_line_bytes} bytes"
            self._problems.add(Problem(number, "line_too_long", message, excerpt_of_bytes(line)))
            return
        try:
            record = parse_record(_content(number, line))
        except LineRefused as error:
            self._problems.add(error.at(number))
            return
        digest = record.digest()
        self._hash.update(digest)
        self._digests += digest
        self._kinds[record.kind] += 1
        self._num_pairs += record.is_pair

    def dataset(self, path: Path) -> Dataset:
        if not self._problems.listed and self._num_distinct < self._limits.min_examples:
            message = f"{self._num_distinct} distinct examples, at least {self._limits.min_examples} are needed"
            self._problems.add(Problem(0, "too_few_examples", message))
        self._problems.raise_if_any()
        return Dataset(
            path=path,
            digest=f"sha256:{self._hash.hexdigest()}",
            num_examples=self._num_examples,
            num_duplicates=self._num_examples - self._num_distinct,
            kinds=dict(self._kinds),
            num_pairs=self._num_pairs,
            _digests=self._digests,
        )

    @property
    def _num_examples(self) -> int:
        return len(self._digests) // DIGEST_BYTES

    @cached_property
    def _num_distinct(self) -> int:
        return len(np.unique(np.frombuffer(self._digests, dtype=f"S{DIGEST_BYTES}")))


def _content(number: int, line: bytes) -> bytes:
    """The line without the file's byte-order mark. number: from 1."""
    return line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line


def _lines(stream: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """Lines with their end. Of an over-long one only the first max_bytes + 1 bytes are ever held."""
    while line := stream.readline(max_bytes + 1):
        yield line
        while len(line) > max_bytes and not line.endswith(b"\n"):
            line = stream.readline(max_bytes + 1)
            if not line:
                return
