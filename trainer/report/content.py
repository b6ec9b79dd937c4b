"""The content of a run's report: curves, gate, samples, provenance, as plain values. Knows the run folder; no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.data.sample import Run
from trainer.redaction import redact_folders
from trainer.run_folder.events import read_events
from trainer.run_folder.folder import RunFolder


@dataclass(frozen=True)
class Sample:
    """One held-out prompt. expected: what the data answers; base, adapter: what they answer, greedily."""

    prompt: str
    expected: str
    base: str
    adapter: str


@dataclass(frozen=True)
class Curves:
    """Against optimizer steps. train: loss of each step; validation: held-out loss; all in nats per learned token.

    tokens_per_s: since the step before. grad_norm: before clipping.
    """

    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    learning_rate: list[tuple[int, float]]
    grad_norm: list[tuple[int, float]]
    tokens_per_s: list[tuple[int, float]]


@dataclass(frozen=True)
class Report:
    """Everything a report shows. spec, result, gate: as the run folder has them. trained_on: marked examples.
    evaluated: prompts that were answered at each evaluation: prompt, expected, and answers as (step, text)."""

    title: str
    spec: dict[str, Any]
    result: dict[str, Any]
    gate: dict[str, Any]
    curves: Curves
    samples: list[Sample]
    evaluated: list[dict[str, Any]]
    trained_on: list[list[Run]]

    def to_mapping(self) -> dict[str, Any]:
        """What report.json holds."""
        return asdict(self)


def collect(
    run_dir: Path,
    *,
    spec: Mapping[str, Any],
    gate: Mapping[str, Any],
    samples: Sequence[Sample] = (),
    trained_on: Sequence[Sequence[Run]] = (),
) -> Report:
    """Read the run's events and result; whatever is not there yet is empty.

    Paths are cut to file names: tenants read the report, and must not see the machine's folders."""
    events = list(read_events(run_dir))
    return Report(
        title=run_dir.resolve().name,
        spec=redact_folders(dict(spec)),
        result=redact_folders(RunFolder(run_dir).result()),
        gate=redact_folders(dict(gate)),
        curves=curves_of(events),
        samples=list(samples),
        evaluated=_evaluated(events),
        trained_on=[list(runs) for runs in trained_on],
    )


def curves_of(events: Sequence[Mapping[str, Any]]) -> Curves:
    """The last event of every step counts: a resumed run writes some steps again."""
    return Curves(
        train=_points(events, "step", "loss"),
        validation=_points(events, "eval", "loss"),
        learning_rate=_points(events, "step", "learning_rate"),
        grad_norm=_points(events, "step", "grad_norm"),
        tokens_per_s=_points(events, "step", "tokens_per_s"),
    )


def _evaluated(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A resumed run answers some steps again; the last answer counts."""
    prompts: dict[int, dict[str, Any]] = {}
    answers: dict[int, dict[int, str]] = {}
    for event in events:
        if event["type"] == "sample":
            prompts[event["number"]] = {"prompt": event["prompt"], "expected": event["expected"]}
            answers.setdefault(event["number"], {})[event["step"]] = event["answer"]
    return [{**prompt, "answers": sorted(answers[number].items())} for number, prompt in sorted(prompts.items())]


def _points(events: Sequence[Mapping[str, Any]], kind: str, name: str) -> list[tuple[int, float]]:
    points = {
        int(event["step"]): float(event[name])
        for event in events
        if event["type"] == kind and event.get(name) is not None
    }
    return sorted(points.items())
