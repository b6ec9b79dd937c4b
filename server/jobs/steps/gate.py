"""The gate step: the measuring process to its end, and its verdict. What is measured is the gate's own decision."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.jobs.served_base import ServedBase
from server.jobs.steps.training import Outcome
from server.jobs.store.records import Job, JobFailure
from server.jobs.tasks.driver import Driver, News
from server.jobs.tasks.executor import Task

ATTEMPTS = 2
GATE = (sys.executable, "-P", "-m", "server.jobs.gate.process")


@dataclass(frozen=True, slots=True)
class Verdict:
    """pass, warn or block, and why."""

    verdict: str
    reasons: tuple[str, ...] = ()

    @property
    def blocks(self) -> bool:
        return self.verdict == "block"

    @property
    def text(self) -> str:
        said = f": {'; '.join(self.reasons)}" if self.reasons else ""
        return f"The gate says {self.verdict}{said}"

    @property
    def failure(self) -> JobFailure:
        """What a blocked job ends with."""
        said = "; ".join(self.reasons) or "no reason was given"
        return JobFailure("gate_blocked", f"the adapter was trained and kept, but not put into service: {said}")


class GateStep:
    """gate: the command before its arguments; the run's folder follows."""

    def __init__(self, driver: Driver, *, gate: tuple[str, ...] = GATE) -> None:
        self._driver = driver
        self._gate = gate

    def run(self, job: Job, served: ServedBase | None) -> tuple[Outcome, JobFailure | None]:
        """Measure, unless that was done. A gate that cannot measure is a failure, never a pass."""
        for _ in range(ATTEMPTS):
            if verdict_in(job.run_dir) is not None:
                return "done", None
            end = self._driver.drive(job, self._task(job, served), news=_nothing)
            if end.asked != "run":
                ended: dict[str, Outcome] = {"cancel": "cancelled", "pause": "paused", "gone": "gone"}
                return ended[end.asked], None
        if verdict_in(job.run_dir) is not None:
            return "done", None
        message = f"the gate could not measure the adapter: {_last_line(job.run_dir / 'gate.log')}"
        return "failed", JobFailure("gate_failed", message)

    def _task(self, job: Job, served: ServedBase | None) -> Task:
        options: list[str] = []
        if served is not None:
            options += ["--dtype", served.dtype, "--device", served.device]
            options += ["--quantize", served.quantize] if served.quantize else []
        return Task("gate", job.run_dir, (*self._gate, str(job.run_dir), *options))


def verdict_in(run_dir: Path) -> Verdict | None:
    """gate.json's, once it is there."""
    try:
        body: Mapping[str, Any] = json.loads((run_dir / "gate.json").read_text())
    except FileNotFoundError:
        return None
    return Verdict(str(body["verdict"]), tuple(str(reason) for reason in body.get("reasons", ())))


def _nothing() -> News:
    return {}, []


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except FileNotFoundError:
        return "it left no log"
    return lines[-1][:300] if lines else "it said nothing"
