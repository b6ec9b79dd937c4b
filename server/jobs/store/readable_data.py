"""Makes a job's own training file one that the trainer reads: as it is, or converted. Knows files; knows no rows."""

from __future__ import annotations

from pathlib import Path

from server.jobs.limits import JobRefused
from trainer.data.formats.convert import convert
from trainer.data.formats.sources import SourceLimits
from trainer.data.jsonl import DataLimits, Dataset, check_pairs, read_jsonl
from trainer.data.problems import DataRejected

LIMITS = DataLimits(max_problems=1000)  # a million short lines, all wrong, took a minute of a core
SOURCES = SourceLimits(parquet=False, max_bytes=1 << 30)  # a tenant's bytes, in the server's process


def make_readable(path: Path, param: str, *, pairs: bool = False) -> str | None:
    """What was recognised and changed; None if the file was read as it is. pairs: whether it must hold preference pairs
    or must not. Raises JobRefused with the line."""
    text, dataset = _readable(path, param)
    try:
        check_pairs(dataset, wanted=pairs, what=param)
    except DataRejected as error:
        raise JobRefused(error.code, error.message, param=param) from None
    return text


def _readable(path: Path, param: str) -> tuple[str | None, Dataset]:
    try:
        return None, read_jsonl(path, LIMITS, what=param)
    except DataRejected as error:
        native = error
    converted = path.with_name(f"{path.name}.converted")
    try:
        report = convert(path, converted, what=param, sources=SOURCES, limits=LIMITS)
        dataset = read_jsonl(converted, LIMITS, what=param)
        converted.replace(path)  # the link to the tenant's bytes, not the bytes
    except DataRejected as error:
        is_native = 1 < native.line >= error.line > 0  # conversion came no further: the file is in our own form
        shown = native if is_native else error
        raise JobRefused(shown.code, shown.message, param=param) from None
    finally:
        converted.unlink(missing_ok=True)
    return report.text, dataset
