"""The gate as a process: reads a run folder, writes gate.json and both reports into it. Decides nothing itself.

    python -m server.jobs.gate RUN_DIR [--dtype D] [--quantize nf4] [--device D]

The precision should be the one that serves. Exit codes: 0 there is a verdict, whichever; 2 bad input, named in
the last line of stderr; 1 anything else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from adapters_store.base.families import UnsupportedBase
from adapters_store.base.files import load_config
from adapters_store.errors import AdapterRejected
from adapters_store.format.adapter_folder import plan_folder
from adapters_store.format.invocation import last_place
from adapters_store.packed.packing import pack
from adapters_store.parsing.adapter_files import WEIGHTS_FILE
from server.engine.model.base_model import BaseModel, load_base
from server.engine.text.tokenizer import Tokenizer
from server.jobs.gate.adapter_weights import module_weights
from server.jobs.gate.base_losses import base_losses
from server.jobs.gate.calls import measure_calls
from server.jobs.gate.peft_reference import round_trip
from server.jobs.gate.serving_scorer import ScorerSettings, ServingScorer, pack_folder
from server.jobs.gate.tuned_base import TunedBase
from trainer.data.dataset import PreparedData, enough_of, prepare
from trainer.data.problems import DataRejected, Problem
from trainer.data.sample import pick, runs_of
from trainer.data.types import EncodedExample
from trainer.gate.answers.calls import CallScores
from trainer.gate.answers.endings import Ends
from trainer.gate.answers.repeated import judge_repeated
from trainer.gate.gate import GateInputs, GateResult, judge, refused
from trainer.gate.general import MIX, OWN_TEXT, own_examples
from trainer.gate.held_out import Int8Loss
from trainer.gate.prompt_use import last_answer
from trainer.gate.round_trip import RoundTrip
from trainer.gate.scorer import BASE_ALONE
from trainer.gate.spectrum import ModuleWeights
from trainer.gate.thresholds import GateThresholds
from trainer.model.held import HeldBase, tokenizer_of
from trainer.report.content import Sample, collect
from trainer.report.page import render
from trainer.run_folder.folder import RunFolder, as_json
from trainer.spec import SpecError, TrainSpec

NUM_SAMPLES, NUM_TRAINED_ON, NUM_CALL_LINES = 6, 4, 256
MAX_NEW_TOKENS = 48  # of a sample: the longest part of a small job's gate were 96
ROUND_TRIP_PROMPTS, ROUND_TRIP_TOKENS = 4, 256


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How the base is served."""

    dtype: str = "auto"
    quantize: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class _Run:
    """What is measured. output: the adapter's folder, or the trained model's."""

    spec: TrainSpec
    output: Path
    base: BaseModel
    data: PreparedData
    tokenizer: Any
    held: HeldBase | None


@dataclass(frozen=True)
class _Measured:
    result: GateResult
    samples: list[Sample]


def gate_run(run_dir: Path, precision: Precision, held: HeldBase | None = None) -> GateResult:
    """Judge the adapter of a finished run and write the three files, gate.json last. held: of a resident process.

    Raises SpecError, DataRejected, UnsupportedBase; OSError if a file of the run cannot be read.
    """
    folder = RunFolder(run_dir)
    spec = TrainSpec.from_yaml(folder.spec)
    limits = GateThresholds()
    load_config(spec.base)  # a folder that holds no base is refused before its tokenizer is read
    tokenizer = tokenizer_of(spec.base, held)
    base = load_base(spec.base, **asdict(precision))
    data = prepare(
        spec,
        tokenizer,
        max_model_len=base.max_model_len,
        num_embeddings=base.num_embeddings,
        enough=enough_of(folder.result().get("provenance", {})),
    )
    _check_same_data(folder, data)
    measured = _measured(_Run(spec, folder.output(spec.method), base, data, tokenizer, held), precision, limits)
    body = {
        **measured.result.to_mapping(),
        "served_as": {"dtype": base.description.dtype, "quantize": precision.quantize, "device": str(base.device)},
    }
    trained_on = [runs_of(example, tokenizer) for example in pick(data.train, NUM_TRAINED_ON)]
    report = collect(run_dir, spec=spec.to_mapping(), gate=body, samples=measured.samples, trained_on=trained_on)
    folder.write(folder.report_json, as_json(report.to_mapping()))
    folder.write(folder.report_html, render(report).encode())
    folder.write_verdict(body)
    return measured.result


def _measured(run: _Run, precision: Precision, limits: GateThresholds) -> _Measured:
    if run.spec.method == "full":
        return _measure_tuned(run, precision, limits)
    try:
        return _measure(run, limits)
    except AdapterRejected as error:
        return _Measured(refused(error.code, error.message, limits), [])


def _measure(run: _Run, limits: GateThresholds) -> _Measured:
    plan = plan_folder(run.output, run.base.description)
    if plan.has_magnitudes:  # its norms belong to the scale it was trained with
        limits = replace(limits, scales=(1.0,))
    scorer = ServingScorer(run.base, pack_folder(run.output, run.base), _settings(run, limits))
    weights = module_weights(plan, run.output, run.spec.base)
    exact, int8 = scorer, None
    if plan.is_int8:  # PEFT serves the adapter as it was trained
        plain = pack(replace(plan, is_int8=False), run.output / WEIGHTS_FILE)
        exact = ServingScorer(run.base, plain, replace(_settings(run, limits), scales=()))
        held_out = pick(run.data.validation, limits.max_examples)
        int8 = Int8Loss(exact.losses(held_out).mean, scorer.losses(held_out).mean)
    trip = round_trip(exact, run.spec.base, run.output, _round_trip_prompts(run), limits, held=run.held)
    return _judged(run, scorer, limits, weights, trip, int8=int8)


def _measure_tuned(run: _Run, precision: Precision, limits: GateThresholds) -> _Measured:
    limits = replace(limits, scales=(1.0,))
    tuned = load_base(run.output, **asdict(precision))
    before, after = (ServingScorer(base, None, _settings(run, limits)) for base in (run.base, tuned))
    trip = round_trip(after, run.output, None, _round_trip_prompts(run), limits)
    return _judged(run, TunedBase(before, after), limits, [], trip)


def _judged(
    run: _Run,
    scorer: ServingScorer | TunedBase,
    limits: GateThresholds,
    weights: Sequence[ModuleWeights],
    trip: RoundTrip,
    *,
    int8: Int8Loss | None = None,
) -> _Measured:
    validation, general = run.data.validation, run.data.general
    own = (
        []
        if general
        else own_examples(run.tokenizer, max_tokens=scorer.max_tokens, num_embeddings=run.base.num_embeddings)
    )
    tokenizer = Tokenizer.load(run.spec.base, run.tokenizer)
    ends = _ends(tokenizer, scorer.max_tokens)
    calls = _calls(run, scorer, tokenizer)
    known = base_losses(scorer, pick(own, limits.max_examples)) if own and isinstance(scorer, ServingScorer) else None
    inputs = GateInputs(
        validation, general or own, MIX if general else OWN_TEXT, weights, trip, ends, calls, int8, known
    )
    result = judge(scorer, inputs, replace(limits, max_pair_tokens=scorer.max_tokens))
    answers = [example.text(chosen=True) for example in pick(validation, NUM_SAMPLES)]
    samples = _side_by_side(scorer, tokenizer, answers)
    return _Measured(result.with_reasons(judge_repeated([(each.expected, each.base) for each in samples])), samples)


def _side_by_side(
    scorer: ServingScorer | TunedBase, tokenizer: Tokenizer, examples: Sequence[EncodedExample]
) -> list[Sample]:
    """The last answer of each example that has a prompt: from the data, from the base and from the adapter."""
    starts = [last_answer(example) for example in examples]
    longest = scorer.max_tokens - MAX_NEW_TOKENS
    chosen = [(example, start) for example, start in zip(examples, starts, strict=True) if 1 < start <= longest]
    prompts = [example.input_ids[:start].tolist() for example, start in chosen]
    ends = tokenizer.chat_end_ids
    answers = scorer.answers(prompts, (BASE_ALONE, 1.0), max_new_tokens=MAX_NEW_TOKENS, eos_ids=ends)
    texts = [[tokenizer.decode(ids) for ids in each] for each in answers]
    return [
        Sample(
            prompt=tokenizer.decode(prompt, skip_special_tokens=False),
            expected=tokenizer.decode(example.input_ids[start:].tolist()),
            base=base,
            adapter=adapter,
        )
        for prompt, (example, start), base, adapter in zip(prompts, chosen, *texts, strict=True)
    ]


def _calls(run: _Run, scorer: ServingScorer | TunedBase, tokenizer: Tokenizer) -> CallScores | None:
    path = run.spec.validation or run.spec.data
    served = scorer if isinstance(scorer, ServingScorer) else scorer.after
    lines = pick(run.data.validation, NUM_CALL_LINES)
    return measure_calls(served, tokenizer, path, lines, run.spec.tool_dialect, template=run.spec.chat_template)


def _ends(tokenizer: Tokenizer, max_tokens: int) -> Ends:
    """The tokens at which the server ends answers: chats also end at the end of a turn."""
    eos_ids = tokenizer.eos_ids
    return Ends({"chat": tokenizer.chat_end_ids, "completion": eos_ids, "text": eos_ids}, max_tokens)


def _round_trip_prompts(run: _Run) -> list[list[int]]:
    chosen = pick(run.data.validation, ROUND_TRIP_PROMPTS)
    return [_cut(example.input_ids.tolist(), run.spec.adapter.invocation) for example in chosen]


def _cut(ids: list[int], invocation: tuple[int, ...]) -> list[int]:
    """The first tokens; for an activated LoRA those around its invocation, before which there is only the base."""
    place = last_place(ids, invocation) if invocation else None
    start = 0 if place is None else max(0, place - (ROUND_TRIP_TOKENS - len(invocation)) // 2)
    return ids[start : start + ROUND_TRIP_TOKENS]


def _settings(run: _Run, limits: GateThresholds) -> ScorerSettings:
    longest = max(map(len, (*run.data.validation, *run.data.general)), default=0)
    vocabulary = Tokenizer(run.tokenizer).vocabulary(run.base.num_embeddings)
    max_tokens = max(longest + MAX_NEW_TOKENS, 1024)
    invocation = run.spec.adapter.invocation or None
    return ScorerSettings(scales=limits.scales, max_tokens=max_tokens, vocabulary=vocabulary, invocation=invocation)


def _check_same_data(folder: RunFolder, data: PreparedData) -> None:
    """The held-out data must be that of this very run. Raises DataRejected."""
    trained = folder.result().get("provenance", {})
    facts = data.facts.to_mapping()
    changed = [name for name in facts if name in trained and trained[name] != facts[name]]
    if changed:
        message = f"{', '.join(changed)} differ from what the run was trained on"
        raise DataRejected([Problem(0, "file_changed", message)])


def main(arguments: Sequence[str] | None = None, held: HeldBase | None = None) -> int:
    """The process. Returns its exit code. held: of a resident process."""
    parser = argparse.ArgumentParser(prog="python -m server.jobs.gate", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--quantize", default=None, choices=("nf4",))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    given = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        precision = Precision(dtype=given.dtype, quantize=given.quantize, device=given.device)
        result = gate_run(given.run_dir, precision, held=held)
    except (SpecError, DataRejected, UnsupportedBase, FileNotFoundError) as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"verdict: {result.verdict}")
    for reason in result.reasons:
        print(f"{reason.level}: {reason.message}")
    for note in result.notes:
        print(f"note: {note}")
    return 0
