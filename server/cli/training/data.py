"""`multilora data check`: what a training file holds, before anything is queued. Decides what is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.options import JsonOption
from server.cli.common.output import Output

if TYPE_CHECKING:
    from trainer.data.formats.convert import Report

app = typer.Typer(help="Check training data before it is trained on.", no_args_is_help=True)

MapOption = Annotated[
    str,
    typer.Option(
        "--map",
        help="Columns of a table with other names: user=COLUMN,assistant=COLUMN, also system and context.",
        metavar="ROLE=COLUMN,...",
    ),
]


@app.callback()
def _root() -> None:
    """Check training data before it is trained on."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="JSON lines, JSON list, CSV, TSV or Parquet; plain or gzip.")],
    *,
    columns: MapOption = "",
    write: Annotated[
        Path | None, typer.Option("--write", help="Write the examples here, as a run reads them.", metavar="OUT.jsonl")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a training file holds, how it is read, and every line that would be refused."""
    from trainer.data.formats.convert import check_file

    output = Output(as_json=as_json)
    if write is not None and write.exists():
        raise CommandError("file_exists", f"--write {write}: the file exists already", ExitCode.CONFLICT)
    report = check_file(file, columns=read_columns(columns), target=write)
    output.emit(file=str(file), usable=report.is_usable, **report.to_mapping())
    _show(report, output)
    if not report.problems and not report.is_usable:
        output.say("too few distinct examples for a run: at least 10 are needed")
    if write is not None:
        output.say(f"written: {write}")
    if report.problems:
        refused = sum(report.counts.values())
        raise CommandError("data_refused", f"{file}: {refused} of the lines cannot be used", ExitCode.REFUSED)


def read_columns(text: str) -> dict[str, str]:
    """Raises CommandError (bad_option)."""
    from trainer.data.formats.convert import columns_of

    try:
        return columns_of(text)
    except ValueError as error:
        raise CommandError("bad_option", f"--map: {error}", ExitCode.REFUSED) from None


@contextmanager
def readable(file: Path, columns: str, output: Output) -> Iterator[Path]:
    """The file as a run reads it: itself, or a converted copy that lives as long as the block. Raises DataRejected."""
    from trainer.data.formats.convert import convert

    named = read_columns(columns)
    if not named and _is_native(file):
        yield file
        return
    with TemporaryDirectory(prefix="multilora-data-") as folder:
        target = Path(folder) / f"{file.stem}.jsonl"
        report = convert(file, target, columns=named, what="training_file")
        output.say(f"data: {report.text}")
        yield target


def _is_native(file: Path) -> bool:
    from trainer.data.jsonl import read_jsonl
    from trainer.data.problems import DataRejected

    try:
        read_jsonl(file)
    except DataRejected:
        return False
    return True


def _show(report: Report, output: Output) -> None:
    output.say(report.text)
    if report.num_duplicates:
        output.say(f"{report.num_duplicates} repeat an earlier example")
    for problem in report.problems:
        output.say(str(problem))
    more = sum(report.counts.values()) - len(report.problems)
    if more > 0:
        output.say(f"and {more} more")
