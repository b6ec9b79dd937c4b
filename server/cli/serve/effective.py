"""`multilora serve --print-config`: the settings as they would apply, each with its source. Shows no secret."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml

from server.cli.common.admin_key import ENVIRONMENT as ADMIN_KEY
from server.cli.common.output import Output
from server.cli.serve.config_file import suggestion
from server.settings import Setting

HIDDEN = "***"
PREFIX = "MULTILORA_"
OTHER_VARIABLES = (ADMIN_KEY, "MULTILORA_CONFIG", "MULTILORA_NATIVE", "MULTILORA_TORCH_OPS")


@dataclass(frozen=True, slots=True)
class Effective:
    """A setting's value, and where it comes from: an option, a variable, a file or the default."""

    setting: Setting
    value: Any
    source: str

    @property
    def shown(self) -> Any:
        """For eyes and logs."""
        if self.setting.about.secret and self.value is not None:
            return HIDDEN
        if isinstance(self.value, tuple):
            return list(self.value)
        return str(self.value) if isinstance(self.value, str | Path) else self.value

    @property
    def line(self) -> str:
        """As a line of a config file. What such a line cannot say is a comment: no value, or a secret one."""
        text = "" if self.value is None else " " + yaml.safe_dump(self.shown, default_flow_style=True).split("\n")[0]
        is_comment = self.value is None or self.setting.about.secret
        return f"{'# ' if is_comment else ''}{self.setting.name}:{text}  # {self.source}"


def effective(
    context: typer.Context, settings: Mapping[str, Setting], values: Mapping[str, Any], config: Path | None
) -> list[Effective]:
    """What applies. Call it in the command, with the values it was given."""
    return [Effective(each, values[name], _source(context, each, config)) for name, each in settings.items()]


def _source(context: typer.Context, setting: Setting, config: Path | None) -> str:
    source = context.get_parameter_source(setting.name)
    match "" if source is None else source.name:
        case "COMMANDLINE":
            return setting.option
        case "ENVIRONMENT":
            return next(name for name in setting.environment if os.environ.get(name))
        case "DEFAULT_MAP":
            return str(config)
    return "default"


def show(found: list[Effective], output: Output) -> None:
    """For people as a config file, for programs as one object."""
    output.emit(settings={each.setting.name: {"value": each.shown, "source": each.source} for each in found})
    section = ""
    for each in found:
        if each.setting.group != section:
            section = each.setting.group
            output.say(f"# {section}", style="bold")
        output.say(each.line, style="dim" if each.source == "default" else "")
    if os.environ.get(ADMIN_KEY):
        output.say(f"# admin key: {HIDDEN}  # {ADMIN_KEY}")


def unknown_variables(settings: Mapping[str, Setting]) -> Iterator[str]:
    """One sentence for each variable of the environment that looks like a misspelt setting."""
    known = dict.fromkeys([*OTHER_VARIABLES, *(name for each in settings.values() for name in each.environment)])
    endings = {name.removeprefix(PREFIX): name for name in known if name.startswith(PREFIX)}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known and (hint := suggestion(name.removeprefix(PREFIX), endings)):
            yield f"{name} sets nothing{hint}"
