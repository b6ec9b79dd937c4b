"""Opens the trackers that a run was asked for, and passes its events on to them. Knows names, not clients.

A client is imported only if it is asked for. Where it sends to, and with which key, is said in the client's own
environment variables, so no key is ever in a spec, an event or a message here.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trainer.redaction import redact_folders
from trainer.report.rows import flat_values
from trainer.run_folder.folder import RunFolder, as_json
from trainer.spec import SpecError, TrainSpec
from trainer.tracking.tracker import Tracked, Tracker, fault_of

FIELD = "track"
_CLASSES = {"tensorboard": "TensorBoardTracker", "mlflow": "MlflowTracker", "wandb": "WandbTracker"}
_STEP = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "peak_bytes")
_ENDS = ("succeeded", "paused", "cancelled")
Note = Callable[[str], None]


def check_usable(names: Sequence[str]) -> None:
    """Raises SpecError for a tracker of another name, and for one whose package is not installed."""
    for name in names:
        if fault := fault_of(name):
            raise SpecError(FIELD, name, fault)


@contextmanager
def tracking(
    names: Sequence[str], folder: RunFolder, spec: TrainSpec, *, first_step: int, note: Note
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What takes the run's events. Raises SpecError for a tracker that cannot be opened, before anything is trained."""
    ids: dict[str, str] = json.loads(folder.tracking.read_bytes()) if folder.tracking.exists() else {}
    opened: dict[str, Tracker] = {}
    trackers = _Trackers(opened, note)
    try:
        for name in names:
            run = Tracked(
                name=folder.path.resolve().name,
                folder=folder.path,
                parameters=dict(flat_values(redact_folders(spec.to_mapping()))),
                tracker_id=ids.get(name),
                first_step=first_step,
            )
            opened[name] = _open(name, run)
        ids |= {name: tracker.run_id for name, tracker in opened.items() if tracker.run_id is not None}
        if ids:
            folder.write(folder.tracking, as_json(ids))
        yield trackers.take
    finally:
        trackers.close()


@dataclass(eq=False)
class _Trackers:
    """A tracker that fails is left out from then on: a run does not end because its curves cannot be shown."""

    opened: dict[str, Tracker]
    note: Note
    status: str = field(default="failed", init=False)

    def take(self, event: Mapping[str, Any]) -> None:
        kind = str(event.get("type"))
        if kind in _ENDS:
            self.status = kind
        elif kind == "step":
            self._numbers(event, {f"train/{name}": event[name] for name in _STEP if event.get(name) is not None})
        elif kind == "eval":
            found = {"held_out/loss": event["loss"], "held_out/base_loss": event.get("base_loss")}
            self._numbers(event, {name: value for name, value in found.items() if value is not None})
        elif kind == "sample":
            text = "\n".join(f"{part}:\n\n```\n{event[part]}\n```\n" for part in ("prompt", "expected", "answer"))
            self._each(lambda tracker: tracker.text(event["step"], f"samples/{event['number']}", text))

    def _numbers(self, event: Mapping[str, Any], values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.numbers(event["step"], values))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close(self.status))

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.opened.items()):
            try:
                do(tracker)
            except Exception as error:  # noqa: BLE001  (a client's errors are its own; their texts may hold addresses and keys)
                del self.opened[name]
                self.note(f"the run is no longer tracked by {name}: {type(error).__name__}")


def _open(name: str, run: Tracked) -> Tracker:
    module = importlib.import_module(f"trainer.tracking.{name}")
    try:
        tracker: Tracker = getattr(module, _CLASSES[name])(run)
    except Exception as error:  # noqa: BLE001  (as above)
        limit = f"a tracker that can be opened ({type(error).__name__}; its address and key are in its own variables)"
        raise SpecError(FIELD, name, limit) from None
    return tracker
