"""`multilora doctor`: runs the checks of `checks` and shows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from server.cli.common.base_path import BaseOption
from server.cli.common.failures import ExitCode
from server.cli.common.logging_setup import set_up_logging
from server.cli.common.options import DEFAULT_DATA_DIR, DataDirOption, HostOption, JsonOption, PortOption
from server.cli.common.output import Output

if TYPE_CHECKING:
    from server.cli.tools.checks import Check

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    base: BaseOption = None,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    as_json: JsonOption = False,
) -> None:
    """Check this machine, the data directory and, if given, a base. Exit code 1 if a check fails."""
    output = Output(as_json=as_json)
    set_up_logging()
    with output.waiting("checking"):
        checks = list(_checks(base, data_dir, host, port, output))
    has_failed = any(check.level == "fail" for check in checks)
    output.emit(ok=not has_failed, checks=[asdict(check) for check in checks])
    _show(checks, output)
    if has_failed:
        raise typer.Exit(ExitCode.FAILED)


def _checks(base: str | None, data_dir: Path, host: str, port: int, output: Output) -> Iterator[Check]:
    from server.cli.tools import checks

    yield checks.check_python()
    yield checks.check_package("torch")
    yield checks.check_package("transformers")
    yield checks.check_native()
    yield checks.check_bf16()
    yield checks.check_cpus()
    yield checks.check_open_files()
    yield checks.check_package("bitsandbytes", without="--quantize nf4 is off without it: ")
    yield checks.check_package("triton", without="only a GPU needs it: ")
    yield checks.check_gpu()
    yield from checks.check_kernels()
    yield checks.check_data_dir(data_dir)
    yield checks.check_store(data_dir, output)
    yield checks.check_memory(base)
    if base is not None:
        yield checks.check_base(base)
    yield checks.check_port(host, port)


def _show(checks: list[Check], output: Output) -> None:
    rows = [
        (Text(check.name), Text(check.level, STYLES[check.level]), Text(check.found), Text(check.advice))
        for check in checks
    ]
    output.table(("check", "", "found", "advice"), rows)
