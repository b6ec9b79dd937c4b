"""The gate before activation: measures an adapter: pass, warn or block, with reasons. Knows the order of checks.

held-out loss, use of the prompt, scale sweep -> ends of answers -> general text -> weights -> round trip -> verdict
(of preference pairs the margin, in place of the first three)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from adapters_store.parsing.numbers import finite_or_none
from trainer.data.sample import pick
from trainer.data.types import EncodedExample
from trainer.gate.answers.calls import CallScores, judge_calls
from trainer.gate.answers.endings import Endings, Ends, judge_endings, measure_endings
from trainer.gate.answers.preference import Preference, judge_preference, measure_preference
from trainer.gate.general import GeneralText, judge_general, measure_general
from trainer.gate.held_out import HeldOut, Int8Loss, judge_held_out, judge_int8, measure_held_out
from trainer.gate.prompt_use import notes_of
from trainer.gate.round_trip import RoundTrip, judge_round_trip
from trainer.gate.scorer import Losses, Scorer
from trainer.gate.spectrum import ModuleSpectrum, ModuleWeights, judge_spectrum, spectrum_of
from trainer.gate.thresholds import GateThresholds
from trainer.gate.verdict import Reason, Verdict, verdict_of


@dataclass(frozen=True, eq=False)
class GateInputs:
    """What is judged. general_source: where the general examples come from. round_trip: None if it was not run.

    ends: the tokens at which the server ends an answer; None: that answers end is not measured. calls: what was asked
    again in chats with tools; None: there are none. int8: None for an adapter in the base's dtype. Of preference pairs
    the margin is judged, not the loss. general_base: the base's losses on the general text of the first max_examples,
    if they are known.
    """

    validation: Sequence[EncodedExample]
    general: Sequence[EncodedExample]
    general_source: str
    weights: Sequence[ModuleWeights]
    round_trip: RoundTrip | None = None
    ends: Ends | None = None
    calls: CallScores | None = None
    int8: Int8Loss | None = None
    general_base: Losses | None = None


@dataclass(frozen=True)
class GateResult:
    """The verdict and all that was measured for it. A part that was not measured is None (or empty)."""

    verdict: Verdict
    reasons: list[Reason]
    thresholds: GateThresholds
    held_out: HeldOut | None = None
    preference: Preference | None = None
    general: GeneralText | None = None
    round_trip: RoundTrip | None = None
    endings: Endings | None = None
    calls: CallScores | None = None
    spectrum: list[ModuleSpectrum] = field(default_factory=list)
    int8: Int8Loss | None = None

    def with_reasons(self, more: Sequence[Reason]) -> GateResult:
        """The result with what else speaks against the adapter."""
        reasons = [*self.reasons, *more]
        return replace(self, verdict=verdict_of(reasons), reasons=reasons)

    @property
    def notes(self) -> list[str]:
        """What could not be measured, and why; none of it counts against the adapter."""
        return notes_of(self.held_out.use, self.thresholds) if self.held_out else []

    def to_mapping(self) -> dict[str, Any]:
        """What gate.json holds; numbers that are not finite are null."""
        body: dict[str, Any] = finite_or_none(
            {
                **asdict(self),
                "reasons": [reason.message for reason in self.reasons],
                "notes": self.notes,
                "findings": [asdict(reason) for reason in self.reasons],
                "held_out": self.held_out and self.held_out.to_mapping(),
                "general": self.general and self.general.to_mapping(),
                "int8": self.int8 and self.int8.to_mapping(),
                "spectrum": [module.to_mapping() for module in self.spectrum],
            }
        )
        return body


def judge(scorer: Scorer, inputs: GateInputs, thresholds: GateThresholds | None = None) -> GateResult:
    """Run every check; weights that are not finite end it at once, since nothing else can be computed with them."""
    limits = thresholds or GateThresholds()
    spectrum = [spectrum_of(module) for module in inputs.weights]
    reasons = judge_spectrum(spectrum, limits)
    if any(reason.code == "non_finite_weights" for reason in reasons):
        return GateResult(verdict_of(reasons), reasons, limits, spectrum=spectrum)
    judged, held_out, preference = _judged_by_data(scorer, pick(inputs.validation, limits.max_examples), limits)
    passages = pick(inputs.general, limits.max_examples)
    general = measure_general(scorer, passages, inputs.general_source, limits, base=inputs.general_base)
    gain = held_out.gain.estimate if held_out is not None else 0.0
    reasons = [*judged, *judge_general(general, limits, gain=gain), *reasons]
    endings = None
    if inputs.ends is not None:
        answers = [example.text(chosen=True) for example in pick(inputs.validation, limits.ending_examples)]
        endings = measure_endings(scorer, answers, inputs.ends)
    if endings is not None:
        reasons += judge_endings(endings, limits)
    if inputs.round_trip is not None:
        reasons += judge_round_trip(inputs.round_trip)
    if inputs.calls is not None:
        reasons += judge_calls(inputs.calls, limits)
    if inputs.int8 is not None:
        reasons += judge_int8(inputs.int8, limits)
    return GateResult(
        verdict_of(reasons),
        reasons,
        limits,
        held_out,
        preference,
        general,
        inputs.round_trip,
        endings,
        inputs.calls,
        spectrum,
        inputs.int8,
    )


def _judged_by_data(
    scorer: Scorer, examples: Sequence[EncodedExample], limits: GateThresholds
) -> tuple[list[Reason], HeldOut | None, Preference | None]:
    """The reasons that the held-out data gives: by its loss, or by the margins of its pairs."""
    if any(example.border for example in examples):
        preference = measure_preference(scorer, examples, limits)
        return judge_preference(preference, limits), None, preference
    held_out = measure_held_out(scorer, examples, limits)
    return judge_held_out(held_out, limits), held_out, None


def refused(code: str, message: str, thresholds: GateThresholds | None = None) -> GateResult:
    """The verdict on an adapter that the server would not even load."""
    reason = Reason(code, "block", f"the server refuses the adapter: {message}")
    return GateResult("block", [reason], thresholds or GateThresholds())
