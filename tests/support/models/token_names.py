"""Reads a token's name as the API gives it."""

from __future__ import annotations

import re


def raw_token(name: str) -> bytes:
    """The bytes behind a name: its UTF-8, or what "bytes:\\xe2\\x82" spells out."""
    if re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", name) is None:
        return name.encode()
    return bytes.fromhex(name.removeprefix("bytes:").replace("\\x", ""))
