"""What a tracker is: a place outside the run folder that shows a run's numbers and texts. Knows no client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

TRACKERS = ("tensorboard", "mlflow", "wandb")


def fault_of(name: str) -> str:
    """What a tracker must be, if this one is not usable here; "" if it is."""
    if name not in TRACKERS:
        return f"one of {', '.join(TRACKERS)}"
    return "" if find_spec(name) else f"a tracker whose package is installed (pip install 'multilora[{name}]')"


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """The run as trackers see it. name: the run folder's. parameters: the spec, flat, without folders of this machine.

    tracker_id: the id that the tracker gave this run before; None at its first start. first_step: the number of the
    next step, 1 at the first start.
    """

    name: str
    folder: Path
    parameters: Mapping[str, Any]
    tracker_id: str | None
    first_step: int


class Tracker(Protocol):
    """One client, opened for one run. Its methods may raise anything: the run continues without it."""

    @property
    def run_id(self) -> str | None:
        """What finds this run again after a pause or a kill; None if the run folder is enough."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Values after this optimizer step, by name."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text of this step, in Markdown."""

    def close(self, status: str) -> None:
        """status: succeeded, paused, cancelled or failed."""
