"""Every setting of `multilora serve`: option, variable and name in the config file, from its one definition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from server.cli.serve.settings import SERVE_SETTINGS
from support.reference.table import table

HEADS = ("option", "variable", "default", "meaning")


def sections() -> Iterator[str]:
    """One table for each section of the settings."""
    rows = setting_rows()
    for title in dict.fromkeys(row["section"] for row in rows):
        yield f"### {title}\n" + table(HEADS, [_row(row) for row in rows if row["section"] == title])


def options() -> set[str]:
    """As they are typed, without their values."""
    return {word.rstrip(",") for row in setting_rows() for word in row["option"].split() if word.startswith("--")}


def _row(row: dict[str, str]) -> tuple[str, ...]:
    unit = f"In {row['unit']}." if row["unit"] else ""
    meaning = " ".join(filter(None, (row["help"], _limits(row["limits"]), unit)))
    variables = ", ".join(f"`{name}`" for name in row["env"].split(", ") if name)
    default = f"`{row['default']}`" if row["default"] else ""
    return f"`{_plain(row['option'])}`", variables, default, _plain(meaning)


def _limits(text: str) -> str:
    """`>= 1` as it is; choices by name."""
    if not text or text[0] in "<>":
        return text and f"{text}."
    return "One of " + ", ".join(f"`{choice}`" for choice in text.split(", ")) + "."


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


def setting_rows() -> list[dict[str, str]]:
    """For the reference, one row a setting: name, section, type, default, limits, unit, option, env, help.

    `option` is as it is typed; `env` are the variables, separated by ", "; a default of "" is explained in `help`.
    """
    return [
        {
            "name": each.name,
            "section": each.group,
            "type": each.type_name,
            "default": default_text(each.default),
            "limits": each.about.limits,
            "unit": each.unit,
            "option": each.option,
            "env": ", ".join(each.environment),
            "help": each.about.help,
        }
        for each in SERVE_SETTINGS.values()
    ]


def default_text(value: Any) -> str:
    """A default as a table shows it."""
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
