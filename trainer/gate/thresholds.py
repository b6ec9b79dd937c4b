"""Every number that the gate judges by, in one place. Decides nothing itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GateThresholds:
    """Losses are in nats per learned token.

    confidence, num_resamples, seed: of every bootstrap. min_examples: held-out examples below which an interval says
    little. small_gain: a gain that is surely below it is none. max_examples: how many are scored at most.
    chosen_rise: of the loss of chosen answers.
    ending_examples: the same for their ends. ending_probability: of the end of an answer where it is over, the median
    example's. calls_named: of held-out answers in chats with tools, the share that calls the right ones.
    general_warn, general_block: rise on general text; up to general_share of the held-out gain, it never blocks.
    scales: of the sweep. sweep_gain: by how much a smaller scale must beat the trained one. collapse_share: effective
    rank over rank, median over modules, under which the rank is wasted. relative_norm_warn, relative_norm_block:
    largest update over its weight, in Frobenius norms.
    scale_low, scale_high: usual alpha / rank. tolerance_float32, tolerance_nf4: largest logit difference from PEFT, per
    unit of the largest logit (at least 1). tolerance_bfloat16: error against exact logits, in PEFT's own error at that
    precision.
    prompt_confidence: of the interval of what a wrong prompt costs. least_prompt_use: what it must cost; or, if that is
    more, prompt_use_share of what it costs the base. enough_pairs: answers that must show it. without_prompt_use:
    share of answers that it may cost less than least_prompt_use. max_pair_tokens: the longest sequence that the scorer
    takes; 0: no longer than the longest example. int8_change: of the held-out loss.
    """

    confidence: float = 0.95
    num_resamples: int = 2000
    seed: int = 0
    min_examples: int = 8
    small_gain: float = 0.05
    chosen_rise: float = 0.3
    prompt_confidence: float = 0.99
    least_prompt_use: float = 0.05
    prompt_use_share: float = 0.25
    enough_pairs: int = 32
    without_prompt_use: float = 0.2
    max_pair_tokens: int = 0
    max_examples: int = 256
    ending_examples: int = 64
    ending_probability: float = 0.1
    calls_named: float = 0.8
    general_warn: float = 0.10
    general_block: float = 0.30
    general_share: float = 0.1
    scales: tuple[float, ...] = (1.0, 0.85, 0.7)
    sweep_gain: float = 0.01
    collapse_share: float = 0.10
    relative_norm_warn: float = 1.0
    relative_norm_block: float = 10.0
    scale_low: float = 0.25
    scale_high: float = 8.0
    tolerance_float32: float = 1e-4
    tolerance_nf4: float = 1e-3
    tolerance_bfloat16: float = 1.5
    int8_change: float = 0.01
