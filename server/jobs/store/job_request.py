"""Turns a tenant's request (OpenAI's fields, and ours) into a TrainSpec. Knows both vocabularies; no rows, no files.

A refusal names the field as the tenant wrote it: `hyperparameters.n_epochs`, not `optim.epochs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from server.jobs.limits import JobLimits, JobRefused
from server.jobs.served_base import ServedBase
from server.jobs.store.records import INITIAL_ADAPTER, MIX_FILE, TRAINING_FILE, VALIDATION_FILE
from trainer.spec import DPO_RATE, AdapterSpec, BatchSpec, Objective, OptimSpec, SpecError, TrainSpec
from trainer.starting import fields_of

SERVED_METHODS = ("lora", "qlora", "dora")  # what the store serves as an adapter
_SECTIONS = (AdapterSpec, OptimSpec, BatchSpec)
_WHOLE_RUN = (
    "method",
    "precision",
    "checkpointing",
    "early_stopping_patience",
    "eval_every",
    "eval_samples",
    "mix_fraction",
    "tool_dialect",
    "chat_template",
    "adapter_dtype",
)
KNOBS: dict[str, tuple[str, ...]] = {
    **{name: (kind.section, name) for kind in _SECTIONS for name in kind.model_fields},
    **{name: (name,) for name in _WHOLE_RUN},
}
MIX_KNOB, NODES_KNOB, RANKS_KNOB = "mix_file", "nodes", "ranks"


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """hyperparameters: OpenAI's, without those that are "auto" or None. knobs: ours, flat, by field name of the spec.
    spec: a part of a TrainSpec, nested; knobs and hyperparameters take precedence. Files are file ids. nodes, ranks:
    machines, and processes on each; with more than one process the training is sharded."""

    model: str
    training_file: str
    validation_file: str | None = None
    mix_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] | None = None
    objective: Objective = "supervised"
    nodes: int = 1
    ranks: int = 1
    knobs: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, kw_only=True)
class StartingAdapter:
    """The version that a job continues from. config: its adapter_config.json; weights: its file, which is only read."""

    ref: str
    config: bytes
    weights: Path


def build_spec(
    request: JobRequest,
    base: ServedBase,
    limits: JobLimits,
    *,
    validation: bool,
    mix: bool,
    start: StartingAdapter | None = None,
) -> TrainSpec:
    """The whole spec on the base being served; files by their names in the job's folder. validation, mix: whether there
    is such a file. Raises JobRefused with the field, its value and the limit."""
    body: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in _own(request)}
    if start is not None:
        body = _going_on(start, body)
    _check_processes(request, limits)
    if request.nodes * request.ranks > 1:
        body["sharding"] = "fsdp"
    if body.get("method") == "dpo":  # short for the objective, on any base
        body["objective"] = body.pop("method")
    if request.objective != "supervised":
        body["objective"] = request.objective
    body.setdefault("method", "qlora" if base.quantize == "nf4" else "lora")
    body.setdefault("precision", base.training_precision)
    origins = {"mix": f"multilora.{MIX_KNOB}"}
    for param, path, value in _requested(request):
        if start is not None and path[0] == "adapter" and path[-1] != "dropout":
            message = f"{param}: must be absent, the adapter keeps the form of {start.ref}; got {value!r:.40}"
            raise JobRefused("invalid_value", message, param=param)
        section = body if len(path) == 1 else body.setdefault(path[0], {})
        section[path[-1]] = value
        origins[".".join(path)] = param
    body |= {"base": str(base.path), "data": TRAINING_FILE}
    body |= {"validation": VALIDATION_FILE if validation else None, "mix": MIX_FILE if mix else None}
    try:
        spec = TrainSpec.from_mapping(body)
    except SpecError as error:
        param = origins.get(error.param, error.param)
        code = {"unknown_field": "unknown_parameter", "bad_field": "invalid_value"}.get(error.code, error.code)
        raise JobRefused(code, error.message.replace(error.param, param, 1), param=param) from None
    _check_servable(spec, limits, origins)
    return spec


def _going_on(start: StartingAdapter, own: dict[str, Any]) -> dict[str, Any]:
    """The starting adapter's form, dialect and template beside the request's own part of a spec."""
    try:
        fields = fields_of(json.loads(start.config))
    except SpecError as error:
        raise JobRefused(
            "invalid_value", f"model: {start.ref} cannot be trained on: {error.message}", param="model"
        ) from None
    adapter = {**fields.pop("adapter"), **own.pop("adapter", {})}
    return {**fields, **own, "adapter": adapter, "initial_adapter": INITIAL_ADAPTER}


def _check_processes(request: JobRequest, limits: JobLimits) -> None:
    for name, value, limit in (
        (NODES_KNOB, request.nodes, limits.max_nodes),
        (RANKS_KNOB, request.ranks, limits.max_ranks),
    ):
        if not 1 <= value <= limit:
            message = f"multilora.{name}: must be from 1 to {limit}, got {value}"
            raise JobRefused("invalid_value", message, param=f"multilora.{name}")


def _own(request: JobRequest) -> list[tuple[str, Any]]:
    for key in request.spec:
        if key in ("base", "data", "validation", "mix", "initial_adapter"):
            raise JobRefused("unknown_parameter", f"spec: {key} cannot be set through this API", param=key)
    return list(request.spec.items())


def _requested(request: JobRequest) -> list[tuple[str, tuple[str, ...], Any]]:
    """(the field as the tenant wrote it, its path in the spec, its value)."""
    requested: list[tuple[str, tuple[str, ...], Any]] = []
    for name, value in request.knobs.items():
        if name not in KNOBS:
            known = ", ".join(sorted((*KNOBS, MIX_KNOB, NODES_KNOB, RANKS_KNOB)))
            message = f"Unknown parameter: 'multilora.{name}'; known: {known}"
            raise JobRefused("unknown_parameter", message, param=f"multilora.{name}")
        requested.append((f"multilora.{name}", KNOBS[name], value))
    paths = {"n_epochs": ("optim", "epochs"), "batch_size": ("batch", "examples"), "beta": ("dpo", "beta")}
    for name, value in request.hyperparameters.items():
        if name in paths:
            requested.append((f"hyperparameters.{name}", paths[name], value))
    multiplier = request.hyperparameters.get("learning_rate_multiplier")
    if multiplier is not None:
        rate = usual_rate(request.objective) * multiplier
        requested.append(("hyperparameters.learning_rate_multiplier", ("optim", "learning_rate"), rate))
    if request.seed is not None:
        requested.append(("seed", ("seed",), request.seed))
    return requested


def usual_rate(objective: str) -> float:
    """The learning rate that a multiplier multiplies."""
    return DPO_RATE if objective == "dpo" else OptimSpec().learning_rate


def _check_servable(spec: TrainSpec, limits: JobLimits, origins: Mapping[str, str]) -> None:
    if spec.method not in SERVED_METHODS:
        param = origins.get("method", "method")
        message = (
            f"{param}: must be one of {', '.join(SERVED_METHODS)} for an adapter to be served, got {spec.method!r}"
        )
        raise JobRefused("unsupported_method", message, param=param)
    rank = max(spec.adapter.rank, *spec.adapter.rank_pattern.values(), 0)
    if rank > limits.max_rank:
        param = origins.get("adapter.rank", "adapter.rank")
        raise JobRefused("rank_too_large", f"{param}: must be at most {limits.max_rank}, got {rank}", param=param)
