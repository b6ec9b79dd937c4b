"""Formats numbers, times and commands for people."""

from __future__ import annotations

import json
import shlex
from datetime import datetime

MIB = 1024 * 1024
GIB = 1024 * MIB
_LAST_S = 253_370_764_800  # the year 9999 begins; local times of more do not all exist


def when(seconds: int) -> str:
    """Unix seconds as local date and time."""
    if seconds >= _LAST_S:
        return "after 9998"
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a digit before the point."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1024, "KiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} bytes"


def curl_line(url: str, *, key: str | None, model: str, prompt: str, chat: bool) -> str:
    """A request to paste into a POSIX shell, in one line. key None: the server needs no key."""
    asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    body = json.dumps({"model": model, **asked, "max_tokens": 64, "temperature": 0}, ensure_ascii=False)
    route = "chat/completions" if chat else "completions"
    auth = "" if key is None else f" -H 'Authorization: Bearer {key}'"
    return f"curl -s {url}/v1/{route}{auth} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
