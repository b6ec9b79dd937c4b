"""Sampling defaults from a base's generation_config.json. Reads one file; knows nothing of requests.

vLLM's rule: "auto" reads the base's own file, a folder reads the one there, "vllm" (here also "neutral") reads none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from adapters_store.base.families import UnsupportedBase
from server.engine.request import InvalidRequest, SamplingParams

NEUTRAL = ("neutral", "vllm")
FILE_NAME = "generation_config.json"
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """Defaults for parameters that a request leaves out; None: the API's own default. max_tokens is for chats only."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The defaults that are set."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}


def sampling_defaults(source: str, base: Path) -> SamplingDefaults:
    """source: "auto", "neutral", "vllm" or a folder. Raises UnsupportedBase for an invalid file.

    `do_sample` is ignored, as in vLLM: files often leave it out although their temperature should apply.
    """
    if source in NEUTRAL:
        return SamplingDefaults()
    path = (base if source == "auto" else Path(source)) / FILE_NAME
    if not path.is_file():
        if source == "auto":
            return SamplingDefaults()
        raise UnsupportedBase(f"--generation-config {source}: the folder has no {FILE_NAME}")
    config = _read(path)
    values = {name: config.get(name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    if values["top_k"] == -1:
        values["top_k"] = 0
    values["max_tokens"] = config.get("max_new_tokens")
    return _checked(values, path)


def _checked(values: dict[str, Any], path: Path) -> SamplingDefaults:
    whole = {"top_k", "max_tokens"}
    for name, value in values.items():
        is_number = isinstance(value, int) or (isinstance(value, float) and name not in whole)
        if value is not None and (isinstance(value, bool) or not is_number):
            raise UnsupportedBase(f"--generation-config {path}: {name} must be a number, got {str(value)[:80]!r}")
    defaults = SamplingDefaults(**values)
    try:
        SamplingParams(**defaults.given)
    except InvalidRequest as error:
        raise UnsupportedBase(f"--generation-config {path}: {error.message}") from error
    if defaults.max_tokens == 0:
        raise UnsupportedBase(f"--generation-config {path}: max_new_tokens must be at least 1, got 0")
    return defaults


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise UnsupportedBase(f"--generation-config {path}: more than {_MAX_FILE_BYTES} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedBase(f"--generation-config {path}: not JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict):
        raise UnsupportedBase(f"--generation-config {path}: must hold a JSON object")
    return config
