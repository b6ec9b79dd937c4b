"""Removes the machine's folders from texts that a tenant reads: only the names of files remain."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# An absolute path of two parts or more on its own: no URL, no "and/or", no relative path.
_ABSOLUTE = re.compile(r"(?<![\w.:/~-])/(?:[^\s/'\"<>]+/)+([^\s/'\"<>]*)")


def redact_folders(value: Any) -> Any:
    """The same value, its texts with every absolute path cut to its last part. Mappings and lists are gone through."""
    if isinstance(value, str):
        return _ABSOLUTE.sub(r"\1", value)
    if isinstance(value, Mapping):
        return {key: redact_folders(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [redact_folders(each) for each in value]
    return value
