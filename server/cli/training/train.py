"""`multilora train`: trains a spec in a separate process, shows its progress, then runs the gate.

The process is `python -m trainer`; what it writes into the run folder is all that is known here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.options import JsonOption
from server.cli.common.output import Output
from server.cli.common.stop_signals import StopSignals
from server.jobs.steps.run_events import shown_loss
from trainer.run_folder.events import EventReader
from trainer.run_folder.folder import PAUSE, Exit, RunFolder
from trainer.spec import TrainSpec

POLL_S = 0.1
SAFE_PATH = {"PYTHONSAFEPATH": "1"}  # as -P, also for the ranks: no module of the current folder is taken
TRAINER_FAILED = "training_failed"
PAUSING = "the run pauses after the forward that it computes now; a second Ctrl-C kills the trainer"
EXITS = {
    "file_not_found": ExitCode.NOT_FOUND,
    "run_dir_in_use": ExitCode.CONFLICT,
    "unsupported_base": ExitCode.UNSUPPORTED,
}


def train(
    spec: Annotated[Path, typer.Argument(help="The spec, as YAML or JSON.", metavar="SPEC.yaml", dir_okay=False)],
    *,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="The run's folder (default: runs/ and the spec's name).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in that folder.")] = False,
    ranks: Annotated[
        int, typer.Option("--ranks", help='Processes; more than one needs sharding "fsdp" in the spec.', min=1)
    ] = 1,
    track: Annotated[
        list[str], typer.Option("--track", help="Show it in tensorboard, mlflow or wandb, too.", metavar="NAME")
    ] = [],  # noqa: B006  (typer copies it)
    gate: Annotated[bool, typer.Option("--gate/--no-gate", help="Compare the trained adapter with the base.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter (or a whole base) without a server. Ctrl-C pauses, --resume resumes.

    A second Ctrl-C kills the trainer: exit code 130, and --resume resumes from the last checkpoint.

    With --json: one object per event, the result last.
    """
    output = Output(as_json=as_json)
    parsed = TrainSpec.from_yaml(spec)
    if ranks > 1 and parsed.sharding != "fsdp":
        raise CommandError("bad_spec", f'--ranks {ranks}: the spec needs sharding: "fsdp"', ExitCode.REFUSED)
    folder = run_dir or Path("runs") / spec.stem
    folder.mkdir(parents=True, exist_ok=True)
    code = _trained(_command(spec, folder, resume=resume, ranks=ranks, track=track), folder, output)
    result = RunFolder(folder).result()
    _raise_unless_succeeded(code, result, folder)
    output.emit(type="result", run_dir=str(folder), **result)
    losses = result["losses"]
    output.say(f"{result['output']}: {folder / result['output']}")
    base, best = (shown_loss(losses[name], 3) for name in ("base", "best"))
    output.say(f"held-out loss {base} -> {best} (step {result['best_step']})")
    if gate:
        _measure(folder, parsed, output)


def _command(spec: Path, folder: Path, *, resume: bool, ranks: int, track: Sequence[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    arguments = [str(spec), "--run-dir", str(folder), *(["--resume"] if resume else [])]
    arguments += [word for name in track for word in ("--track", name)]
    return [sys.executable, "-P", *launcher, "-m", "trainer", *arguments]


def _trained(command: list[str], folder: Path, output: Output) -> int:
    """The trainer's exit code. The first signal asks the trainer to pause, the second kills it.

    Raises CommandError (interrupted).
    """
    run, events = RunFolder(folder), EventReader(folder, from_end=True)
    with StopSignals() as signals, run.train_log.open("ab") as log, Screen(output) as screen:
        signals.defer()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **SAFE_PATH},
            start_new_session=True,
        )
        is_pausing = False
        try:
            while not _has_ended(process, signals, run):
                if signals.asked and not is_pausing:
                    is_pausing = True
                    run.request(PAUSE)
                    screen.show([{"type": "note", "message": PAUSING}])
                screen.show(events.new_events())
                time.sleep(POLL_S)
            screen.show(events.new_events())
        finally:
            if process.poll() is None:  # the reader of our output is gone, and nothing would follow the run
                run.request(PAUSE)
                while not _has_ended(process, signals, run):
                    time.sleep(POLL_S)
    if signals.count > 1 and process.returncode == -signal.SIGKILL:
        message = f"the trainer was killed; --resume --run-dir {folder} resumes it from its last checkpoint"
        raise CommandError("interrupted", message, ExitCode.INTERRUPTED)
    return process.returncode


def _has_ended(process: subprocess.Popen[bytes], signals: StopSignals, run: RunFolder) -> bool:
    """At the second signal it has: the trainer's process group is killed."""
    if signals.count > 1 and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        run.request("")  # else a resumed run pauses at once
    return process.poll() is not None


@dataclass(eq=False)
class Screen:
    """Shows the run: a progress bar on a terminal, else a line per evaluation, objects for programs."""

    output: Output

    def __enter__(self) -> Screen:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bar = Progress(
            *columns, TimeElapsedColumn(), console=self.output.console, disable=not self.output.is_live
        )
        self._bar.start()
        self._task = self._bar.add_task("starting", total=None, text="")
        self._validation = ""
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, events: Iterable[dict[str, Any]]) -> None:
        """Show these events."""
        for event in events:
            self.output.emit(**event)
            if event["type"] == "stage":
                self._bar.update(self._task, description=str(event["stage"]))
            elif event["type"] == "note":
                self.output.say(f"note: {event['message']}", style="yellow")
            elif event["type"] == "data_check":
                self.output.say(f"data: {event['message']}")
            elif event["type"] == "eval":
                self._evaluated(event)
            elif event["type"] == "step":
                self._stepped(event)

    def _evaluated(self, event: dict[str, Any]) -> None:
        self._validation = f"held-out {shown_loss(event['loss'], 3)}"
        if not self.output.is_live:
            self.output.say(f"step {event['step']}: {self._validation}")

    def _stepped(self, event: dict[str, Any]) -> None:
        speed = f"{event['tokens_per_s']:.0f} tokens/s  {event['eta_s']:.0f} s left"
        text = f"loss {event['loss']:.3f}  {self._validation}  {speed}"
        self._bar.update(self._task, completed=event["step"], total=event["num_steps"], text=text)


def _raise_unless_succeeded(code: int, result: dict[str, Any], folder: Path) -> None:
    status = result.get("status", "")
    if code == 0 and status == "succeeded":
        return
    if status in ("paused", "cancelled"):
        how = f"; --resume --run-dir {folder} resumes it" if status == "paused" else ""
        raise CommandError(status, f"the run was {status} after step {result['step']}{how}")
    error = result.get("error") or _last_error(RunFolder(folder).train_log)
    name = error["code"]
    raise CommandError(
        name, error["message"], EXITS.get(name, ExitCode.REFUSED if code == Exit.BAD_INPUT else ExitCode.FAILED)
    )


def _last_error(log: Path) -> dict[str, str]:
    """The trainer's error if it could not write a result: "code: message" in its last line."""
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    code, separator, message = lines[-1].partition(": ")
    if separator and code.isidentifier():
        return {"code": code, "message": message}
    return {"code": TRAINER_FAILED, "message": f"the trainer exited without writing a result; see {log}"}


def _measure(folder: Path, spec: TrainSpec, output: Output) -> None:
    """The gate's verdict on what was trained. Raises CommandError (gate_blocked, gate_failed)."""
    from server.jobs.steps.gate import GATE, gate_options

    run = RunFolder(folder)
    command = [*GATE, str(folder), *gate_options(quantize="nf4" if spec.method == "qlora" else None)]
    with output.waiting("measuring the adapter against the base"), run.gate_log.open("ab") as log:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
    verdict = run.verdict()
    if code != 0 or verdict is None:
        raise CommandError("gate_failed", f"the gate exited with code {code}; see {run.gate_log}")
    reasons = "; ".join(str(reason) for reason in verdict.get("reasons", ()))
    output.emit(type="gate", verdict=verdict["verdict"], reasons=verdict.get("reasons", []))
    output.say(f"gate: {verdict['verdict']}{': ' + reasons if reasons else ''}")
    output.say(f"report: {run.report_html}")
    if verdict["verdict"] == "block":
        raise CommandError(
            "gate_blocked", f"the trained adapter is kept but should not be served: {reasons}", ExitCode.REFUSED
        )
