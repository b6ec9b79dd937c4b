"""Gemma 2 and 3: one call as a JSON object that is the whole answer. Their templates know no tools and no results.

Source: Google's guide "Function calling with Gemma" (JSON form).
"""

from __future__ import annotations

from adapters_store.dialects.dialect import Dialect

GEMMA = Dialect(
    name="gemma",
    middle=('", "parameters": ',),
    instructions=(
        "You have access to functions. If you decide to call one, answer with {form} and no other text. Functions:"
    ),
    in_first_user_turn=True,
)
