"""What a training process tells, as its owner shall see it. Reads events.jsonl as it grows; knows no database.

A line that is told again (the run was resumed, the worker was another) gives the same key, so it is kept once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_METRIC_EVENTS = 200  # of a run: more steps than that are told every so many
_PROGRESS = ("step", "num_steps", "loss", "learning_rate", "tokens", "tokens_per_s", "peak_bytes", "eta_s")


@dataclass
class RunEvents:
    """The file, how far it has been read, and the figures so far. valid_loss: of the latest evaluation."""

    path: Path
    progress: dict[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)
    _offset: int = 0

    def news(self) -> list[dict[str, Any]]:
        """What was written since, as `JobStore.record` takes it. A last line still being written waits."""
        told = []
        for line in self._new_lines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue  # half a line of a run that was killed; the resumed run says it again
            if isinstance(event, dict):
                told += self._take(event)
        return told

    def _new_lines(self) -> list[bytes]:
        try:
            with self.path.open("rb") as stream:
                if stream.seek(0, 2) < self._offset:
                    self._offset = 0  # a resumed run has cut off what came after its checkpoint
                stream.seek(self._offset)
                *whole, _half = stream.read().split(b"\n")
        except FileNotFoundError:
            return []
        self._offset += sum(len(line) + 1 for line in whole)
        return whole

    def _take(self, event: Mapping[str, Any]) -> list[dict[str, Any]]:
        self.last = event
        kind, step = event.get("type"), event.get("step")
        if kind == "step":
            return self._step(event)
        if kind == "eval":
            self.progress |= {"valid_loss": event.get("loss"), "base_loss": event.get("base_loss")}
            text = f"Step {step}: validation loss={_shown(event.get('loss'))}"
            return [_metrics(f"eval:{step}", text, {"step": step, "valid_loss": event.get("loss")})]
        if kind == "checkpoint":
            figures = {"step": step, "train_loss": self.progress.get("loss")}
            figures["valid_loss"] = event.get("loss", self.progress.get("valid_loss"))
            return [{"checkpoint": step, "data": figures}]
        if kind == "stage":
            stage = event.get("stage") or event.get("name") or ""
            return [{"key": f"stage:{stage}", "message": f"Training: {stage}"}]
        return []

    def _step(self, event: Mapping[str, Any]) -> list[dict[str, Any]]:
        step, count = int(event["step"]), int(event.get("num_steps") or 0)
        self.progress |= {name: event[name] for name in _PROGRESS if name in event}
        every = max(1, -(-count // MAX_METRIC_EVENTS))
        if step % every and step != count:
            return []
        figures = {"step": step, "train_loss": event.get("loss"), "learning_rate": event.get("learning_rate")}
        text = f"Step {step}/{count}: training loss={_shown(event.get('loss'))}"
        return [_metrics(f"step:{step}", text, {**figures, "total_steps": count})]


def _metrics(key: str, message: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {"key": key, "message": message, "kind": "metrics", "data": data}


def _shown(loss: Any) -> str:
    return f"{loss:.4f}" if isinstance(loss, int | float) else "unknown"
