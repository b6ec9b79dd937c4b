"""GGUF files by llama.cpp's own converters: its checkout is found, one script is run, the file appears whole."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from server.cli.common.failures import CommandError, ExitCode

Kind = Literal["gguf", "gguf-lora"]
KINDS: tuple[Kind, ...] = ("gguf", "gguf-lora")
VARIABLE = "LLAMA_CPP"
SCRIPTS: dict[Kind, str] = {"gguf": "convert_hf_to_gguf.py", "gguf-lora": "convert_lora_to_gguf.py"}
_MAGIC = b"GGUF"


def find_converter(kind: Kind, checkout: Path | None) -> Path:
    """The script in `checkout`, or on the PATH without one. Raises CommandError."""
    script = SCRIPTS[kind]
    found = shutil.which(script) if checkout is None else str(checkout.expanduser() / script)
    if found is not None and Path(found).is_file():
        return Path(found)
    where = "on the PATH" if checkout is None else f"in {checkout}"
    raise CommandError(
        "no_converter",
        f"--format {kind} needs llama.cpp's {script}, which is not {where}: get its sources (git clone "
        f"https://github.com/ggml-org/llama.cpp) and name their folder by --llama-cpp or {VARIABLE}",
        ExitCode.NOT_FOUND,
    )


def lora_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's config for a file that holds one alpha, which llama.cpp divides by each layer's rank.

    Raises CommandError for scales that no such alpha gives."""
    if config.get("alpha_pattern") or (config.get("use_rslora") and config.get("rank_pattern")):
        named = "alpha_pattern" if config.get("alpha_pattern") else "use_rslora with rank_pattern"
        message = f"{named}: a GGUF adapter holds one scale for all layers; --format gguf merges the adapter instead"
        raise CommandError("not_in_gguf", message, ExitCode.REFUSED)
    alpha = config["lora_alpha"] * (math.sqrt(config["r"]) if config.get("use_rslora") else 1.0)
    return {**config, "lora_alpha": alpha, "use_rslora": False}


def convert(script: Path, source: Path, out: Path, *arguments: str) -> None:
    """Run the converter on the folder `source`. `out`, in a folder that exists, is written whole or not at all; nothing
    is fetched.

    Raises CommandError with the converter's last line if it fails."""
    aside = out.with_name(f".{out.name}.part")
    command = [sys.executable, "-P", str(script), str(source), "--outfile", str(aside), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(script.resolve().parent)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
        if done.returncode != 0 or not _is_gguf(aside):
            last = (done.stderr.strip() or done.stdout.strip() or "it wrote no GGUF file").splitlines()[-1]
            raise CommandError("converter_failed", f"{script.name}: {last}")
        aside.rename(out)
    finally:
        aside.unlink(missing_ok=True)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC
