"""Numbers from outside: text and JSON values, each against its limits. Knows no field and no error.

Python reads more than we mean: `int` takes "²"'s kin and any length, `str.isdigit` takes "²" itself, and a JSON integer
of 400 digits overflows every float function. Here the limits are asked before anything is converted.
"""

from __future__ import annotations

import math
from typing import Any

MAX_INT = 2**63 - 1  # the largest that a database column, a torch tensor and JSON readers share


def whole_number(text: str, low: int = 0, high: int = MAX_INT) -> int | None:
    """The number that ASCII digits say, if it is low to high; None for any other text. Neither sign nor space."""
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0") or "0"
    if len(digits) > len(str(high)):
        return None
    value = int(digits)
    return value if low <= value <= high else None


def is_within(value: object, low: float, high: float, *, open_low: bool = False) -> bool:
    """If a value is a number from low (excluded with open_low) to high. No bool; NaN is within nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high and not (open_low and value == low)


def finite_or_none(value: Any) -> Any:
    """The value as JSON can hold it: floats that are not finite become None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    return [finite_or_none(item) for item in value] if isinstance(value, list | tuple) else value
