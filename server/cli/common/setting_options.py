"""Makes the options of a command from the definitions of its settings. Decides how a setting becomes an option."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from server.jobs.limits import JobLimits
from server.jobs.settings import JobSettings
from server.settings import Setting, settings_of

Command = Callable[..., None]
SERVICE_LINK = "MULTILORA_PORT"


def option_for(setting: Setting, *names: str) -> Any:
    """The typer.Option of a setting. names: as it is typed, if not after the parameter."""
    is_path = setting.kind is Path

    def checked(value: Any) -> Any:
        try:
            setting.check(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        return value.expanduser() if is_path and value is not None else value

    about = setting.about
    return typer.Option(
        *names,
        help=_help_of(setting),
        metavar=about.metavar,
        min=about.at_least if about.above is None else about.above,
        max=about.at_most if about.below is None else about.below,
        envvar=list(setting.environment) if len(setting.environment) > 1 else setting.environment[0],
        callback=checked,
        file_okay=not is_path,
        rich_help_panel=setting.group or None,
    )


def offering(settings: Iterable[Setting], *, cut: str = "") -> Callable[[Command], Command]:
    """Decorates a command: one option a setting, which the command takes as keywords by the settings' names. cut: what
    the options are typed without."""

    def offer(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [each for each in own if each.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters += [_parameter_of(each, each.option.replace(cut, "", 1)) for each in settings]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return offer


def drop_service_link() -> None:
    """Kubernetes and Docker set MULTILORA_PORT to a URL in every container beside a service called multilora."""
    if "://" in os.environ.get(SERVICE_LINK, ""):
        del os.environ[SERVICE_LINK]


def _parameter_of(setting: Setting, option: str) -> inspect.Parameter:
    default = None if setting.is_list else setting.default
    kind = _kind_of(setting)
    hint: Any = kind if default is not None else kind | None
    name = f"{option}/--no-{option[2:]}" if kind is bool else option
    annotation = Annotated[hint, option_for(setting, name)]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kind_of(setting: Setting) -> Any:
    """Choices are an enumeration for typer."""
    if setting.about.choices:
        enumeration: Any = StrEnum
        return enumeration(setting.name, {choice: choice for choice in setting.about.choices})
    kind: Any = setting.kind
    return list[kind] if setting.is_list else kind


def _help_of(setting: Setting) -> str:
    """With the unit; help of a number of tokens says so itself."""
    unit = setting.unit
    help = setting.about.help
    return help if unit in ("", "tokens") else f"{help} In {unit}."


_LIMITS = {each.name: each for each in settings_of(JobLimits, prefix="jobs_", group="Jobs")}
_RUNNING = {each.name: each for each in settings_of(JobSettings, group="Jobs") if each.name != "jobs"}
JobsMemoryOption = Annotated[int | None, option_for(_LIMITS["jobs_memory_mib"])]
WORKER_SETTINGS = (_LIMITS["jobs_max_running"], _LIMITS["jobs_memory_mib"], *_RUNNING.values())
