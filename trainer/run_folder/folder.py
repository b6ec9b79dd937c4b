"""The folder of one run: the name of every file in it, and the way to read and write each. Knows files; no training.

    spec.yaml, provenance.json          what is trained, on what
    control                             "pause" or "cancel": what the run is asked to do
    events.jsonl                        one line an event, growing (trainer.run_folder.events)
    checkpoints/                        trainer.run_folder.checkpoint
    tracking.json                       the ids that trackers gave the run; tensorboard/ and wandb/: their files
    result.json                         how the run ended
    adapter/ or model/                  what it made
    gate.json, report.json, report.html what the gate measured
    train.log, gate.log                 the output of both processes

Torch stays out: the server, its job worker and the command line read run folders as well.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from adapters_store.errors import UserError
from adapters_store.filesystem import Filesystem

PAUSE, CANCEL = "pause", "cancel"
_CHECKPOINT = re.compile(r"step-(\d{6,})")


class Exit(IntEnum):
    """The training process's exit code. BAD_INPUT: the same input fails again. FAILED: another attempt may work."""

    SUCCEEDED = 0
    FAILED = 1
    BAD_INPUT = 2
    PAUSED = 3
    CANCELLED = 4


class RunDirInUse(UserError):
    """The run folder holds another run."""

    def __init__(self, message: str) -> None:
        super().__init__("run_dir_in_use", message, param="run_dir")


@dataclass(frozen=True)
class _Named:
    """A file or folder of the run folder, by its name."""

    name: str

    def __get__(self, folder: RunFolder, owner: type[RunFolder]) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """path: the folder, which need not exist yet. files: the operations, replaceable in tests."""

    path: Path
    files: Filesystem = field(default_factory=Filesystem, compare=False, repr=False)

    spec = _Named("spec.yaml")
    provenance = _Named("provenance.json")
    events = _Named("events.jsonl")
    checkpoints = _Named("checkpoints")
    tracking = _Named("tracking.json")
    adapter = _Named("adapter")
    model = _Named("model")
    report_json = _Named("report.json")
    report_html = _Named("report.html")
    train_log = _Named("train.log")
    gate_log = _Named("gate.log")
    _result = _Named("result.json")
    _verdict = _Named("gate.json")
    _control = _Named("control")

    def output(self, method: str) -> Path:
        """What a run of this method makes: a whole model, or an adapter."""
        return self.model if method == "full" else self.adapter

    @property
    def has_begun(self) -> bool:
        return self.events.exists()

    def result(self) -> dict[str, Any]:
        """result.json: how the run ended; empty while it has no result."""
        return _object_in(self._result) or {}

    @property
    def has_succeeded(self) -> bool:
        return self.result().get("status") == "succeeded"

    def write_result(self, result: Mapping[str, Any]) -> None:
        self.write(self._result, as_json(result))

    def drop_result(self) -> None:
        """A run that resumes has no result yet."""
        self._result.unlink(missing_ok=True)

    def verdict(self) -> dict[str, Any] | None:
        """gate.json: the gate's verdict and what it measured; None before the gate is done."""
        return _object_in(self._verdict)

    def write_verdict(self, body: Mapping[str, Any]) -> None:
        self.write(self._verdict, as_json(body))

    def requested(self) -> str:
        """PAUSE, CANCEL, or "": what the run is asked to do. Any other word in the file counts as none."""
        try:
            word = self._control.read_text(errors="replace").strip()
        except FileNotFoundError:
            return ""
        return word if word in (PAUSE, CANCEL) else ""

    def request(self, word: str) -> None:
        """Ask the run to PAUSE or CANCEL; it checks once a step. "": withdraw the request."""
        if not word:
            self._control.unlink(missing_ok=True)
            return
        self.files.write_atomic(self._control, word.encode(), durable=False)  # worth nothing after a crash

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        names = [path.name for path in self.checkpoints.iterdir()] if self.checkpoints.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name)))

    def drop_checkpoints(self) -> None:
        """A run that has ended for good is not resumed; adapter, report and events stay."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def write(self, path: Path, content: bytes) -> None:
        """Write one file of the folder, whole or not at all, and durably."""
        self.files.write_atomic(path, content)


def as_json(body: Any) -> bytes:
    """Indented JSON. Raises ValueError for a number that is not finite, which JSON cannot hold."""
    return json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _object_in(path: Path) -> dict[str, Any] | None:
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return body if isinstance(body, dict) else None
