"""Turns a training's events into the job events, checkpoints and figures its owner sees. Knows no database.

An event that is read again (the run was resumed, or another worker took over) has the same key, so it is kept once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.run_folder.events import EventReader

MAX_METRIC_EVENTS = 200  # of a run; a longer run shows every n-th step
_PROGRESS = ("step", "num_steps", "loss", "learning_rate", "tokens", "tokens_per_s", "peak_bytes", "eta_s")


@dataclass
class RunEvents:
    """progress: the latest figures; its valid_loss is of the latest evaluation. last: the latest event."""

    reader: EventReader
    progress: dict[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)

    def new_entries(self) -> list[dict[str, Any]]:
        """What was written since the last call, as `JobStore.record` takes it."""
        return [entry for event in self.reader.new_events() for entry in self._take(event)]

    def _take(self, event: Mapping[str, Any]) -> list[dict[str, Any]]:
        self.last = event
        kind, step = event.get("type"), event.get("step")
        if kind == "step":
            return self._step(event)
        if kind == "eval":
            self.progress |= {"valid_loss": event.get("loss"), "base_loss": event.get("base_loss")}
            text = f"Step {step}: validation loss={shown_loss(event.get('loss'))}"
            return [_metrics(f"eval:{step}", text, {"step": step, "valid_loss": event.get("loss")})]
        if kind == "checkpoint":
            figures = {"step": step, "train_loss": self.progress.get("loss")}
            figures["valid_loss"] = event.get("loss", self.progress.get("valid_loss"))
            return [{"checkpoint": step, "data": figures}]
        return _messages(event)

    def _step(self, event: Mapping[str, Any]) -> list[dict[str, Any]]:
        step, count = int(event["step"]), int(event.get("num_steps") or 0)
        self.progress |= {name: event[name] for name in _PROGRESS if name in event}
        every = max(1, -(-count // MAX_METRIC_EVENTS))
        if step % every and step != count:
            return []
        figures = {"step": step, "train_loss": event.get("loss"), "learning_rate": event.get("learning_rate")}
        text = f"Step {step}/{count}: training loss={shown_loss(event.get('loss'))}"
        return [_metrics(f"step:{step}", text, {**figures, "total_steps": count})]


def _messages(event: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is said in words; nothing for other kinds of events."""
    kind = event.get("type")
    if kind == "data_check":
        return [{"key": "data_check", "message": str(event.get("message")), "level": str(event.get("level"))}]
    if kind == "sample":
        text = f"Step {event.get('step')}: answers {event.get('answer')!r} to held-out prompt {event.get('number')}"
        return [{"key": f"sample:{event.get('step')}:{event.get('number')}", "message": text}]
    if kind == "note":
        return [{"key": f"note:{event.get('message')}", "message": str(event.get("message")), "level": "warn"}]
    if kind == "working":
        of = "" if event.get("of") is None else f" of {event['of']}"
        text = f"Training: {event.get('what')}, {event.get('done')}{of} forwards done"
        return [{"key": f"working:{event.get('what')}:{event.get('done')}", "message": text}]
    if kind == "stage":
        stage = event.get("stage") or event.get("name") or ""
        return [{"key": f"stage:{stage}", "message": f"Training: {stage}"}]
    return []


def _metrics(key: str, message: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {"key": key, "message": message, "kind": "metrics", "data": data}


def shown_loss(loss: Any, digits: int = 4) -> str:
    """A loss that was not finite is null in an event."""
    return f"{loss:.{digits}f}" if isinstance(loss, int | float) else "unknown"
