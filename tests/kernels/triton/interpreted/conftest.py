"""These files need Triton's interpreter from the first import on: `test_interpreter.py` runs them apart."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
