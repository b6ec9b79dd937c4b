"""The records of a file, whatever holds them: JSON lines, a JSON list, CSV, TSV, Parquet; plain or gzip.

Knows containers; knows nothing of what a record means. Every record comes out as the JSON text of one object.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from trainer.data.problems import DataRejected, Problem

Numbered = Iterator[tuple[int, bytes]]  # from 1: the line, the list's element or the table's row
_CHUNK = 1 << 16
_MARKS = {
    b"PK\x03\x04": ("unsupported_file", "a zip or Excel file: export it as CSV or JSON lines"),
    b"\xff\xfe": ("not_utf8", "UTF-16: save the file as UTF-8"),
    b"\xfe\xff": ("not_utf8", "UTF-16: save the file as UTF-8"),
    b"%PDF": ("unsupported_file", "a PDF: training data is text, one example a line"),
    b"\x28\xb5\x2f\xfd": ("unsupported_file", "zstd: unpack the file, or use gzip"),
}
_BLANKS = " \t\r\n"


@dataclass(frozen=True, kw_only=True)
class SourceLimits:
    """max_record_bytes: of one record. max_bytes: of a file once it is unpacked. parquet: whether it may be read; its
    reader is a large C++ library, which a server does not hand its tenants' bytes to."""

    max_record_bytes: int = 4 << 20
    max_bytes: int = 4 << 30
    parquet: bool = True


class SourceRefused(DataRejected):
    """The file cannot be read as a whole, or not beyond a line."""

    def __init__(self, code: str, message: str, what: str, line: int = 0) -> None:
        super().__init__([Problem(line, code, message)], what=what)


@contextmanager
def opened(path: Path, limits: SourceLimits, *, what: str) -> Iterator[tuple[str, Numbered]]:
    """(container's name, records). The name: "JSON lines", "JSON list", "CSV", "TSV" or "Parquet", maybe " (gzip)".

    Raises DataRejected (unsupported_file, not_utf8, bad_json, bad_table, line_too_long, file_too_large) here or while
    records are read; OSError if the file cannot be read.
    """
    with path.open("rb") as plain:
        head = plain.read(4)
        plain.seek(0)
        _refuse_by_mark(head, what)
        if head == b"PAR1":
            yield "Parquet", _parquet(path, limits, what)
            return
        if not head.startswith(b"\x1f\x8b"):
            name, records = _text(plain, limits, what)
            yield name, records
            return
        with gzip.open(plain) as unpacked:
            with _unpacking(what):
                name, records = _text(io.BufferedReader(cast(Any, unpacked)), limits, what)
            yield f"{name} (gzip)", _unpacked(records, what)


def _unpacked(records: Numbered, what: str) -> Numbered:
    with _unpacking(what):
        yield from records


@contextmanager
def _unpacking(what: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceRefused("unsupported_file", f"the gzip file is damaged: {error}", what) from None


def _refuse_by_mark(head: bytes, what: str) -> None:
    for mark, (code, message) in _MARKS.items():
        if head.startswith(mark):
            raise SourceRefused(code, f"this is {message}", what)


def _text(stream: BinaryIO, limits: SourceLimits, what: str) -> tuple[str, Numbered]:
    """What the first characters say it is."""
    lines = _Lines(stream, limits, what)
    first = lines.first.lstrip().decode("utf-8", "replace")
    if first.startswith("["):
        return "JSON list", _elements(lines, limits, what)
    if first.startswith("{") or not first.strip():
        return "JSON lines", lines.all()
    for name, delimiter in (("TSV", "\t"), ("CSV", ","), ("CSV", ";")):
        if len(_header(first, delimiter)) > 1:
            return name, _rows(lines, delimiter, limits, what)
    message = "no format is recognised: neither JSON lines, a JSON list, a table with a header, nor Parquet"
    raise SourceRefused("unsupported_file", f"{message} (it begins {first[:40]!a})", what)


class _Lines:
    """Lines without the byte-order mark; the first is read ahead. Counts bytes, so that nothing unpacks for ever."""

    def __init__(self, stream: BinaryIO, limits: SourceLimits, what: str) -> None:
        self._stream, self._limits, self._what = stream, limits, what
        self._num_bytes = 0
        self.first, self.first_number = self._read().removeprefix(codecs.BOM_UTF8), 1
        while self.first in (b"\n", b"\r\n"):
            self.first, self.first_number = self._read(), self.first_number + 1

    def _read(self) -> bytes:
        line = self._stream.readline(self._limits.max_record_bytes + 1)
        self._num_bytes += len(line)
        if self._num_bytes > self._limits.max_bytes:
            raise SourceRefused(
                "file_too_large", f"more than {self._limits.max_bytes} bytes once it is unpacked", self._what
            )
        return line

    def chunks(self) -> Iterator[bytes]:
        """Lines; one that is too long in several parts."""
        line = self.first
        while line:
            yield line
            line = self._read()

    def all(self) -> Numbered:
        """Blank lines are passed over; a line that is too long comes cut, and is refused as such where it is parsed."""
        number, line = self.first_number, self.first
        while line:
            whole = line
            while line and not line.endswith(b"\n") and len(line) > self._limits.max_record_bytes:
                line = self._read()
            if whole.strip():
                yield number, whole
            number += 1
            line = self._read()

    def texts(self) -> Iterator[str]:
        """Decoded lines. Raises DataRejected (not_utf8)."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        for number, line in enumerate(self.chunks(), start=self.first_number):
            is_whole = line.endswith(b"\n") or len(line) <= self._limits.max_record_bytes
            try:
                yield decoder.decode(line, final=is_whole)
            except UnicodeDecodeError as error:
                raise SourceRefused(
                    "not_utf8", f"byte {error.start + 1} of the line is not UTF-8", self._what, number
                ) from None


def _elements(lines: _Lines, limits: SourceLimits, what: str) -> Numbered:
    """A JSON list's elements, a part of the file in memory at a time."""
    scan = json.JSONDecoder().raw_decode
    texts = lines.texts()
    buffer, at, number = next(texts).lstrip(), 1, 0
    while True:
        at = _next_value(buffer, at, number)
        if buffer.startswith("]", at):
            rest = buffer[at + 1 :] + "".join(_some(texts))
            if rest.strip():
                raise SourceRefused("bad_json", f"text follows the end of the list: {rest.strip()[:40]!a}", what)
            return
        try:
            _, end = scan(buffer, at)
        except (json.JSONDecodeError, RecursionError) as error:
            grown = "" if len(buffer) - at > limits.max_record_bytes else "".join(_some(texts))
            if not grown:
                raise SourceRefused(
                    "bad_json", f"element {number + 1} of the list is not JSON: {error}", what, number + 1
                ) from None
            buffer, at = buffer[at:] + grown, 0
            continue
        number += 1
        yield number, buffer[at:end].encode("utf-8", "surrogatepass")
        at = end


def _next_value(buffer: str, at: int, number: int) -> int:
    """Past blanks, and past one comma behind an element."""
    comma = number > 0
    while at < len(buffer) and (buffer[at] in _BLANKS or (comma and buffer[at] == ",")):
        comma = comma and buffer[at] != ","
        at += 1
    return at


def _some(texts: Iterator[str]) -> Iterator[str]:
    """About a chunk's worth."""
    size = 0
    for text in texts:
        yield text
        size += len(text)
        if size >= _CHUNK:
            return


def _header(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _rows(lines: _Lines, delimiter: str, limits: SourceLimits, what: str) -> Numbered:
    csv.field_size_limit(limits.max_record_bytes)
    reader = csv.reader(lines.texts(), delimiter=delimiter, strict=True)

    def number() -> int:
        return lines.first_number - 1 + reader.line_num

    try:
        header = [name.strip() for name in next(reader)]
        if len(set(header)) != len(header) or "" in header:
            raise SourceRefused(
                "bad_table", f"the header has an empty or a repeated name: {ascii(header)[:200]}", what, number()
            )
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                message = f"the row has {len(row)} cells, the header {len(header)}; quote cells that hold a delimiter"
                raise SourceRefused("bad_table", message, what, number())
            yield number(), _as_json(dict(zip(header, row, strict=True)), number(), what)
    except csv.Error as error:
        raise SourceRefused("bad_table", f"not a table: {error}", what, number()) from None


def _parquet(path: Path, limits: SourceLimits, what: str) -> Numbered:
    if not limits.parquet:
        how = "convert it with `multilora data check FILE --write OUT.jsonl`"
        raise SourceRefused("unsupported_file", f"this is Parquet, which the server does not open; {how}", what)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        how = "install pyarrow, or export it as JSON lines (`Dataset.to_json`)"
        raise SourceRefused("unsupported_file", f"this is Parquet, and pyarrow is not installed; {how}", what) from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, _as_json(row, number, what)
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceRefused("unsupported_file", f"the Parquet file is damaged: {str(error)[:200]}", what) from None


def _as_json(row: dict[str, Any], number: int, what: str) -> bytes:
    def refused(value: object) -> NoReturn:
        raise SourceRefused("wrong_type", f"a cell holds {type(value).__name__}, not text", what, number)

    return json.dumps(row, ensure_ascii=False, default=refused).encode("utf-8", "surrogatepass")
