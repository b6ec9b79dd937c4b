"""The gate step: runs the gate's process to its end and reads its verdict. Measures nothing itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from server.jobs.served_base import ServedBase
from server.jobs.steps.training import Outcome, write_spec
from server.jobs.store.records import Job, JobFailure
from server.jobs.tasks.driver import Driver
from server.jobs.tasks.executor import Task
from server.jobs.tasks.resident import PYTHON
from trainer.run_folder.folder import RunFolder

ATTEMPTS = 2
GATE = (*PYTHON, "server.jobs.gate")


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
        reasons = f": {'; '.join(self.reasons)}" if self.reasons else ""
        return f"The gate's verdict: {self.verdict}{reasons}"

    @property
    def failure(self) -> JobFailure:
        """The failure of a blocked job."""
        reasons = "; ".join(self.reasons) or "no reason was given"
        return JobFailure("gate_blocked", f"the adapter was trained and kept, but not activated: {reasons}")


def gate_options(*, dtype: str = "auto", quantize: str | None, device: str = "auto") -> list[str]:
    """The precision that serves, as the gate's arguments."""
    return ["--dtype", dtype, "--device", device, *(["--quantize", quantize] if quantize else [])]


class GateStep:
    """gate: the command before its arguments; the run's folder follows."""

    def __init__(self, driver: Driver, *, gate: tuple[str, ...] = GATE) -> None:
        self._driver = driver
        self._gate = gate

    def run(self, job: Job, served: ServedBase | None) -> tuple[Outcome, JobFailure | None]:
        """Measure, unless there is a verdict already. A gate that cannot measure is a failure, never a pass."""
        for _ in range(ATTEMPTS):
            if verdict_in(job.run_dir) is not None:
                return "done", None
            if (folder := RunFolder(job.run_dir)).spec.exists():
                write_spec(job, folder.spec.name)  # the training may have run on another host
            end = self._driver.run_to_end(job, self._task(job, served))
            if end.desired != "run":
                ended: dict[str, Outcome] = {"cancel": "cancelled", "pause": "paused", "gone": "gone"}
                return ended[end.desired], None
        if verdict_in(job.run_dir) is not None:
            return "done", None
        message = f"the gate could not measure the adapter: {_last_line(RunFolder(job.run_dir).gate_log)}"
        return "failed", JobFailure("gate_failed", message)

    def _task(self, job: Job, served: ServedBase | None) -> Task:
        options = (
            gate_options(quantize=None)
            if served is None
            else gate_options(dtype=served.dtype, quantize=served.quantize, device=served.device)
        )
        return Task("gate", job.run_dir, (*self._gate, str(job.run_dir), *options))


def verdict_in(run_dir: Path) -> Verdict | None:
    """The gate's verdict; None before it is done."""
    body = RunFolder(run_dir).verdict()
    return (
        None
        if body is None
        else Verdict(str(body["verdict"]), tuple(str(reason) for reason in body.get("reasons", ())))
    )


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except FileNotFoundError:
        return "no log was written"
    return lines[-1][:300] if lines else "no output"
