"""PYTHONPATH of a process that a test starts: this checkout, then the tests' own modules.

In this order: folders of tests have names of packages, and would be found in their place.
"""

from __future__ import annotations

import os
from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]
SOURCE_PATH = os.pathsep.join(str(_REPOSITORY / part) for part in ("", "kernels", "tests"))
