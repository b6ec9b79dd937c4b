"""events.jsonl: written by the run as it goes, followed by every reader in the same way. Knows files; decides nothing.

A full disk must not hide the failure it causes: a small reserve is kept on disk and given up for the final event.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from adapters_store.parsing.numbers import finite_or_none
from trainer.run_folder.folder import Exit, RunFolder

RESERVE_FILE = ".reserve"
RESERVE_BYTES = 64 * 1024
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunLog:
    """Writes the run's events and result. quiet: another rank writes them; this one does not. listeners: get every
    event once it is written."""

    def __init__(self, folder: RunFolder, *, quiet: bool = False) -> None:
        self._folder = folder
        self._quiet = quiet
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        if not quiet:
            self._folder.files.write(self._reserve, b"\0" * RESERVE_BYTES)
            _drop_half_line(folder.events)

    @property
    def _reserve(self) -> Path:
        return self._folder.path / RESERVE_FILE

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line. Numbers that are not finite are written as null, which JSON can hold."""
        if not self._quiet:
            self._append(kind, fields)

    def note(self, message: str) -> None:
        self.event("note", message=message)

    def _append(self, kind: str, fields: dict[str, Any]) -> None:
        body = finite_or_none({"time": time.time(), "type": kind, **fields})
        with self._folder.events.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(body) + "\n")
        for listener in self.listeners:
            listener(body)

    def end(self, kind: str, result: dict[str, Any], **fields: Any) -> None:
        """Write the final event and result.json; the reserve makes room for both."""
        if not self._quiet:
            self._write_end(kind, result, fields)

    def failed(
        self, error: dict[str, str | None], code: int = Exit.FAILED, *, earlier: Mapping[str, Any] | None = None
    ) -> None:
        """Any rank may report a failure. The first one counts: the others fail because of it. code: its exit code.
        earlier: the result of an earlier start that this one resumes, which the failure replaces."""
        if self._folder.result() in ({}, earlier):
            _drop_half_line(self._folder.events)
            self._write_end("failed", {"status": "failed", "exit_code": code, "error": error}, {"error": error})

    def _write_end(self, kind: str, result: dict[str, Any], fields: dict[str, Any]) -> None:
        self._reserve.unlink(missing_ok=True)
        self._append(kind, fields)
        self._folder.write_result(finite_or_none(result))


class EventReader:
    """Follows events.jsonl while a run writes it. from_end: events that are there already are skipped."""

    def __init__(self, run_dir: Path, *, from_end: bool = False) -> None:
        self._path = RunFolder(run_dir).events
        self._offset = self._path.stat().st_size if from_end and self._path.exists() else 0

    def new_events(self) -> Iterator[dict[str, Any]]:
        """The events written since the last call. A line without its end waits for the next call.

        A line that is no JSON object is skipped: a killed run may have left half a line, and repeats it when resumed.
        """
        for line in self._new_lines():
            try:
                event = json.loads(line)
            except ValueError:  # not JSON, or not UTF-8
                continue
            if isinstance(event, dict):
                yield event

    def _new_lines(self) -> list[bytes]:
        try:
            with self._path.open("rb") as stream:
                if stream.seek(0, 2) < self._offset:
                    self._offset = 0  # the file was truncated or replaced
                stream.seek(self._offset)
                *lines, _rest = stream.read().split(b"\n")
        except FileNotFoundError:
            return []
        self._offset += sum(len(line) + 1 for line in lines)
        return lines


def read_events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Every whole event so far."""
    return EventReader(run_dir).new_events()


def _drop_half_line(path: Path) -> None:
    """A killed run may leave a line without its end; what is appended must not be glued to it."""
    if path.exists():
        written = path.read_bytes()
        keep = written.rfind(b"\n") + 1
        if keep < len(written):
            with path.open("r+b") as stream:
                stream.truncate(keep)


def is_disk_full(error: BaseException) -> bool:
    """Whether the error means a full disk or quota. safetensors carries it in its text only."""
    if isinstance(error, SafetensorError):
        return any(f"(os error {number})" in str(error) for number in DISK_FULL)
    return isinstance(error, OSError) and error.errno in DISK_FULL
