"""Which names tenants and adapters may have, and how "name@3" is read. Knows nothing stored."""

from __future__ import annotations

import re

from adapters_store.errors import InputRefused, NotFound
from adapters_store.parsing.strict_json import shown

FINE_TUNED = "ft:"  # begins a job's own name for its adapter: ft:base:tenant:name:version

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,127}")
_REF = re.compile(r"([A-Za-z0-9][A-Za-z0-9._:\-]{0,127})(?:@([1-9][0-9]{0,8}))?")


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def check_name(param: str, name: str) -> None:
    """Raises InputRefused (bad_name) unless `name` is 1 to 128 of letters, digits and ._:- with no mark first."""
    if not is_name(name):
        rule = "1 to 128 letters, digits, '.', '_', ':' or '-', beginning with a letter or digit"
        raise InputRefused("bad_name", f"{param}: {shown(name)} is not a name ({rule})", param=param)


def split_ref(ref: str) -> tuple[str, int | None]:
    """ "name" -> (name, None); "name@3" -> (name, 3). Raises NotFound (model_not_found): such a name cannot exist."""
    match = _REF.fullmatch(ref)
    if match is None:
        raise NotFound("model_not_found", f"no adapter {shown(ref)}", param="model")
    return match[1], int(match[2]) if match[2] else None
