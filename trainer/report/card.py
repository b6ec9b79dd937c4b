"""The card of an exported adapter, README.md as model hubs read it: base, data, training and the gate's checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from trainer.report.rows import checks_of

Body = Mapping[str, Any]


def card(name: str, *, base_name: str, base_digest: str, config: Body, report: Body | None) -> str:
    """config: the adapter_config.json. report: its run's report.json; None for an adapter that was not trained here."""
    head = {
        "base_model": base_name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "multilora"],
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {name}",
        "",
        f"A LoRA adapter of `{base_name}` in PEFT's format: rank {config.get('r')}, alpha {config.get('lora_alpha')}.",
        f"It fits the base with the digest `{base_digest}` and no other.",
        "",
        *(_trained(report) if report else ("It was uploaded: how it was trained is not known here.",)),
    ]
    return "\n".join(lines) + "\n"


def _trained(report: Body) -> Iterator[str]:
    spec, result, gate = report["spec"], report["result"], report["gate"]
    data, losses = result.get("provenance", {}), result.get("losses", {})
    yield from ("## Training", "", "| | |", "|---|---|")
    rows = {
        "method": f"{spec.get('method')}, {spec.get('objective', 'supervised')}",
        "data": f"`{data.get('data_digest')}`, {data.get('num_train')} examples, {data.get('num_validation')} held out",
        "chat template": f"`{data.get('template_digest')}`",
        "steps": f"{result.get('step')}, the best one is {result.get('best_step')}",
        "held-out loss": f"{_number(losses.get('base'))} before, {_number(losses.get('best'))} after",
        "precision, seed": f"{spec.get('precision')}, {spec.get('seed')}",
    }
    yield from (f"| {name} | {value} |" for name, value in rows.items())
    yield from ("", f"## The gate: {gate.get('verdict', 'not judged')}", "")
    yield from (f"- {reason}" for reason in gate.get("reasons", ()))
    yield from ("", "| check | measured | limit | result |", "|---|---|---|---|")
    yield from (f"| {check.name} | {check.measured} | {check.limit} | {check.level} |" for check in checks_of(gate))


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "unknown"
