"""Settings from a YAML file. Decides what such a file may hold; knows nothing of what the settings do."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from adapters_store.parsing.strict_yaml import load_yaml
from server.cli.common.failures import CommandError, ExitCode
from server.settings import Setting

_MAX_BYTES = 1 << 20


def read_config(path: Path, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The file's values by setting's name. Raises CommandError (bad_config) with file, key and value; OSError."""
    if path.stat().st_size > _MAX_BYTES:
        raise _refused(path, f"must be at most {_MAX_BYTES:,} bytes")
    try:
        body = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _refused(path, " ".join(str(error).split())) from error
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise _refused(path, f"must hold one setting a line (name: value), got {body!r:.80}")
    return checked_values(path, body, settings)


def checked_values(source: Path | str, body: Mapping[Any, Any], settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The values by setting's name, those without one left out. Raises CommandError (bad_config) with the source."""
    values: dict[str, Any] = {}
    for key, value in body.items():
        name = str(key).replace("-", "_")
        if name not in settings:
            raise _refused(source, f"unknown setting {str(key)!r:.80}{suggestion(name, settings)}")
        if name in values:
            raise _refused(source, f"duplicate key {name!r}")
        values[name] = _word(value) if settings[name].about.choices else value
    return {name: _checked(source, settings[name], value) for name, value in values.items() if value is not None}


def suggestion(name: str, known: Mapping[str, Any]) -> str:
    """A known name that is alike, as the end of a sentence; "" if nothing is alike."""
    close = get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _checked(path: Path | str, setting: Setting, value: Any) -> Any:
    items = value if setting.is_list and isinstance(value, list) else [value]
    for item in items:
        if not _is_a(setting.kind, item):
            raise _refused(path, f"{setting.name} must be of type {setting.type_name}, got {_shown(setting, item)}")
    try:
        setting.check(items if setting.is_list else value)
    except ValueError as error:
        raise _refused(path, str(error)) from None
    return [str(item) for item in items] if setting.is_list else value


def _word(value: Any) -> Any:
    """YAML reads a bare on or off as true or false; for a setting with choices it is the word."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _is_a(kind: type, value: Any) -> bool:
    """YAML's own type; a whole number is a number, and true is no number."""
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, bool) if kind is bool else isinstance(value, str)


def _shown(setting: Setting, value: Any) -> str:
    return "***" if setting.about.secret else f"{value!r:.80}"


def _refused(path: Path | str, reason: str) -> CommandError:
    return CommandError("bad_config", f"{path}: {reason}", ExitCode.REFUSED)
