"""`multilora serve`: reads the settings, takes the port, and hands over to `run`, which knows the engine."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_kernels.process import unscanned_imports
from server.cli.common.base_path import find_base
from server.cli.common.failures import CommandError, ExitCode
from server.cli.common.listening import bound
from server.cli.common.logging_setup import set_up_logging
from server.cli.common.options import JsonOption
from server.cli.common.output import Output
from server.cli.common.setting_options import offering
from server.cli.common.stop_signals import StopSignals
from server.cli.serve.config_file import read_config
from server.cli.serve.effective import effective, show, unknown_variables
from server.cli.serve.settings import SERVE_SETTINGS, ServeSettings
from server.settings import built

_PROBLEM = "multilora.config_problem"


def _load(context: typer.Context, path: Path | None) -> Path | None:
    """Give the file's values the rank below options and variables. What is wrong with it is raised later, when it is
    known whether the answer is JSON."""
    if path is not None:
        try:
            context.default_map = read_config(path.expanduser(), SERVE_SETTINGS)
        except (CommandError, OSError) as error:
            context.meta[_PROBLEM] = error
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Settings from a YAML file: one NAME: VALUE a line, named as the options without dashes in front.",
        metavar="FILE",
        envvar="MULTILORA_CONFIG",
        callback=_load,
        is_eager=True,
    ),
]
PrintConfigOption = Annotated[
    bool, typer.Option("--print-config", help="Print every setting, its value and its source as YAML, and exit.")
]


@offering(SERVE_SETTINGS.values())
def serve(
    context: typer.Context,
    *,
    config: ConfigOption = None,
    print_config: PrintConfigOption = False,
    as_json: JsonOption = False,
    **given: Any,
) -> None:
    """Serve a base and every tenant's adapters for it over HTTP, until SIGINT or SIGTERM.

    Every setting can be given as an option, as a variable MULTILORA_NAME or in the --config file; the first of these
    that gives it counts. Prints "ready on URL" once requests are served; /ready answers 200 from then on. With --json
    the lines are events: stage, memory, admin_key, ready, stopping, stopped. The first start creates the admin key;
    MULTILORA_ADMIN_KEY replaces it.
    """
    if problem := context.meta.get(_PROBLEM):
        raise problem
    values = {name: _plain(value) for name, value in given.items()}
    output = Output(as_json=as_json, with_events=True)
    if print_config:
        show(effective(context, SERVE_SETTINGS, values, config), output)
        return
    settings = settings_from(values, output)
    set_up_logging(log_format=settings.log_format)
    for message in unknown_variables(SERVE_SETTINGS):
        output.event("warning", code="unknown_variable", message=message)
        output.say(message, style="yellow")
    with StopSignals() as signals, bound(settings.host, settings.port) as listener:
        with output.stage("importing torch and transformers"), unscanned_imports():
            from server.cli.serve import run as serving
        serving.run(settings, listener, output, signals)
    output.event("stopped")
    output.say("stopped")


def settings_from(values: Mapping[str, Any], output: Output | None = None) -> ServeSettings:
    """One start of the server, from a value for each setting. output: hears of a GGUF base that is converted.

    Raises BadParameter, CommandError (base_not_found, bad_setting), UnsupportedBase.
    """
    if values["base"] is None:
        raise typer.BadParameter("is required; or MULTILORA_BASE, or base in the --config file", param_hint="--base")
    _check_batch(values)
    folder, own_name = find_base(values["base"], output)
    try:
        return built(ServeSettings, {**values, "base": folder, "served_name": values["served_name"] or own_name})
    except ValueError as error:
        raise CommandError("bad_setting", str(error), ExitCode.USAGE) from error


def _check_batch(values: Mapping[str, Any]) -> None:
    tokens, rows = values["max_batch_tokens"], values["max_running"]
    if tokens is not None and rows is not None and tokens < rows:
        message = f"must be at least --max-running ({rows}), got {tokens}"
        raise typer.BadParameter(message, param_hint="--max-batch-tokens")


def _plain(value: Any) -> Any:
    """An option's value as a settings class holds it."""
    if isinstance(value, Enum):
        return value.value
    return tuple(value) if isinstance(value, list) else value
