"""What a run tells while it runs, and how it ended: events.jsonl and result.json. Knows files; decides nothing.

A full disk must not silence the failure it causes: a small reserve is kept on disk and given up for the last words.
"""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from adapters_store.storage.filesystem import Filesystem

EVENTS_FILE = "events.jsonl"
RESULT_FILE = "result.json"
RESERVE_FILE = ".reserve"
RESERVE_BYTES = 64 * 1024
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunLog:
    """The run folder's two records. quiet: another rank writes; this one says nothing."""

    def __init__(self, run_dir: Path, *, quiet: bool = False, files: Filesystem | None = None) -> None:
        self._run_dir = run_dir
        self._quiet = quiet
        self._files = files or Filesystem()
        if not quiet:
            self._files.write(run_dir / RESERVE_FILE, b"\0" * RESERVE_BYTES)
            _drop_half_line(run_dir / EVENTS_FILE)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line. Numbers that are not finite are written as null, which JSON can hold."""
        if not self._quiet:
            self._append(kind, fields)

    def _append(self, kind: str, fields: dict[str, Any]) -> None:
        body = {"time": time.time(), "type": kind, **fields}
        with (self._run_dir / EVENTS_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(_finite(body)) + "\n")

    def last_words(self, kind: str, result: dict[str, Any], **fields: Any) -> None:
        """The final event and result.json, written aside and renamed; the reserve makes room for both."""
        if self._quiet:
            return
        self._write_last_words(kind, result, fields)

    def failed(self, error: dict[str, str | None]) -> None:
        """Any rank may say so; the first one is heard, since the others fail because of it."""
        if not (self._run_dir / RESULT_FILE).exists():
            self._write_last_words("failed", {"status": "failed", "error": error}, {"error": error})

    def _write_last_words(self, kind: str, result: dict[str, Any], fields: dict[str, Any]) -> None:
        (self._run_dir / RESERVE_FILE).unlink(missing_ok=True)
        self._append(kind, fields)
        aside = self._run_dir / f".{RESULT_FILE}.aside"
        self._files.write(aside, json.dumps(_finite(result), indent=2).encode() + b"\n")
        self._files.sync_file(aside)
        self._files.rename(aside, self._run_dir / RESULT_FILE)
        self._files.sync_folder(self._run_dir)

    def forget_result(self) -> None:
        """A run that goes on has no result yet."""
        if not self._quiet:
            (self._run_dir / RESULT_FILE).unlink(missing_ok=True)


def read_events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of events.jsonl; the last one may be half written while a run is alive, or after a crash."""
    path = run_dir / EVENTS_FILE
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n")[:-1]:
        yield json.loads(line)


def _drop_half_line(path: Path) -> None:
    """A killed run may leave a line without its end; what is appended must not be glued to it."""
    if path.exists():
        written = path.read_bytes()
        keep = written.rfind(b"\n") + 1
        if keep < len(written):
            with path.open("r+b") as stream:
                stream.truncate(keep)


def is_disk_full(error: BaseException) -> bool:
    """Whether this error says that the disk, or the quota on it, is used up. safetensors says it in words only."""
    if isinstance(error, SafetensorError):
        return any(f"(os error {number})" in str(error) for number in DISK_FULL)
    return isinstance(error, OSError) and error.errno in DISK_FULL


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
