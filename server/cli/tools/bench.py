"""`multilora bench`: runs the source checkout's benchmarks. Reads their list from their page.

They are not installed with the package: a server does not need what they compare with (PEFT, TRL, Locust).
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.options import JsonOption
from server.cli.common.output import Output

app = typer.Typer(help="List and run the benchmarks of a source checkout.", no_args_is_help=True)

ROOT = Path(__file__).parents[3]
_ROW = re.compile(r"^\| `python -m benchmarks\.(\w+)[^`]*` \| (.+?) \| (?:.*? )?\| (.*?) ?\|$", re.MULTILINE)
_STDERR = 2  # the descriptor


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One row of the benchmarks' page. minutes: on four cores, unless it says otherwise."""

    name: str
    claim: str
    minutes: str


def benchmarks(root: Path) -> dict[str, Benchmark]:
    """By name, in the page's order. Raises CommandError (no_benchmarks) if `root` is no source checkout."""
    page = root / "benchmarks" / "README.md"
    if not page.is_file():
        message = f"{page.parent}: not there; benchmarks come with the source, not with the installed package"
        raise CommandError("no_benchmarks", f"{message}: run them in a checkout", ExitCode.NOT_FOUND)
    found = [Benchmark(*row) for row in _ROW.findall(page.read_text(encoding="utf-8"))]
    return {each.name: each for each in found}


@app.command("list")
def list_benchmarks(as_json: JsonOption = False) -> None:
    """List the benchmarks, what each claims, and how many minutes it takes."""
    output = Output(as_json=as_json)
    known = benchmarks(ROOT)
    output.emit(data=[asdict(each) for each in known.values()])
    output.table(("benchmark", "claim", "minutes"), [(each.name, each.claim, each.minutes) for each in known.values()])


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="As `list` shows it.", metavar="NAME")],
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: checks that it runs, measures nothing.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results (default: the checkout's).", metavar="DIR")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run one benchmark; further options are passed to it."""
    output = Output(as_json=as_json)
    known = benchmarks(ROOT)
    if name not in known:
        message = f"unknown benchmark {name!r}; choose from: {', '.join(known)}"
        raise CommandError("benchmark_not_found", message, ExitCode.NOT_FOUND)
    options = [*(["--quick"] if quick else []), *([] if out is None else ["--out", str(out.absolute())])]
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, *context.args]
    done = subprocess.run(command, cwd=ROOT, stdout=_STDERR if as_json else None, check=False)
    if done.returncode:
        raise CommandError("benchmark_failed", f"{name} ended with exit code {done.returncode}")
    output.emit(benchmark=name, quick=quick, exit_code=done.returncode)
