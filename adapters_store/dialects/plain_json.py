"""Plain JSON, for bases that were never taught a dialect: each call a JSON object in a line of its own."""

from __future__ import annotations

from adapters_store.dialects.dialect import Dialect

JSON = Dialect(name="json", between=("\n",))
