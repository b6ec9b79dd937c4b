"""Every command and option of `multilora`, read from Typer itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import typer
from typer.core import TyperArgument, TyperGroup

from server.cli.main import app
from support.reference import settings
from support.reference.table import table

SERVE = "multilora serve"


def sections() -> Iterator[str]:
    """One section for each command, in the order of `multilora --help`."""
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    yield from _group("multilora", root)


def _group(path: str, group: TyperGroup) -> Iterator[str]:
    context = typer.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if command.hidden:
            continue
        if isinstance(command, TyperGroup):
            yield from _group(f"{path} {name}", command)
        else:
            yield _command(f"{path} {name}", command)


def _command(path: str, command: Any) -> str:
    arguments = [param for param in command.params if isinstance(param, TyperArgument)]
    options = [param for param in command.params if param not in arguments and not param.hidden]
    if path == SERVE:
        options = [param for param in options if not settings.options() & set(param.opts)]
        note = "\nEvery setting of [settings of serve](#settings-of-serve) is an option too.\n"
    else:
        note = ""
    title = " ".join([path, *(_metavar(param) for param in arguments)])
    summary = " ".join((command.help or "").split("\n\n")[0].split())
    rows = [_row(param) for param in (*arguments, *options)]
    return f"### `{title}`\n{_plain(summary)}\n{note}\n" + table(("option", "default", "environment", "meaning"), rows)


def _metavar(param: TyperArgument) -> str:
    name = param.metavar or (param.name or "").upper()
    return name if param.required else f"[{name}]"


def _row(param: Any) -> tuple[str, str, str, str]:
    if isinstance(param, TyperArgument):
        names = _metavar(param)
    else:
        names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    meaning = _plain(" ".join((param.help or "").split()))
    return (
        names,
        _default(param),
        f"`{param.envvar}`" if param.envvar else "",
        " ".join(filter(None, (meaning, _range(param)))),
    )


def _default(param: Any) -> str:
    if param.required:
        return "required"
    if param.is_flag and not param.secondary_opts:
        return "off"
    value = param.default
    if callable(value) or value in (None, (), "") or type(value).__name__ == "Sentinel":
        return ""
    if isinstance(value, list | tuple):
        return " ".join(f"`{item}`" for item in value)
    return f"`{value.value if isinstance(value, Enum) else value}`"


def _range(param: Any) -> str:
    """What the option's type says of its values."""
    kind = param.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "One of " + ", ".join(f"`{choice.value}`" for choice in kind) + "."
    low, high = getattr(param, "min", None), getattr(param, "max", None)
    if low is None and high is None:
        return ""
    if high is None:
        return f"At least {_number(low)}."
    return f"At most {_number(high)}." if low is None else f"{_number(low)} to {_number(high)}."


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 else f"{int(value)}"


def _plain(text: str) -> str:
    """Without rich's marks and without what a table would take for its own."""
    return re.sub(r"\[/?(?:bold|dim|italic|green|red|yellow|cyan)[^\]]*\]", "", text).replace("|", "\\|")
