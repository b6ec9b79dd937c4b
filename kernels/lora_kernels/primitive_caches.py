"""How many compiled products oneDNN keeps. Imports no torch: it must be asked before torch multiplies.

Of every shape that a product in bf16 has, oneDNN keeps the code it compiled, and torch's layer above it (ideep) the
description once more: half a megabyte or more together, for 1,024 shapes each. A prompt's step has any number of tokens
and five shapes of weights, so a server grew for hours, towards 740 MB. To compile again takes 0.15 ms a shape, which
prompts' steps do not show (benchmarks/op_primitives.py).
"""

from __future__ import annotations

import os

KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "1"}  # 0.6 MB each; ideep's own saves nothing


def keep_few_primitives() -> None:
    """Call before torch's first product. An operator's own setting of either is left alone."""
    for name, capacity in KEPT.items():
        os.environ.setdefault(name, capacity)
