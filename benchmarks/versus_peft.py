"""Ours against PEFT's mixed batch (`adapter_names`), and our bare base against transformers, both by `generate`.

Same base, same adapter files, same prompts, one process, turn by turn. Theirs with their defaults: PEFT casts adapters
to float32, which here is also the faster way (12 % over bfloat16 adapters on one core). Prompts are equally long, so
nothing is padded, and no side looks for an end of sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.common.adapters import BenchStore, bench_store
from benchmarks.common.report import Report, Row, bars, legend_below, number, spread
from benchmarks.common.shapes import BenchShape, base_folder, shape_for
from benchmarks.common.timing import Spread, interleaved, ratio
from benchmarks.common.workload import MAX_ROWS, Lengths, bench_engine, lengths_for, random_prompts, run_batch
from benchmarks.model_tax import Case

CASES = [Case(8, 0), Case(8, 1), Case(8, 8), Case(32, 0), Case(32, 32)]
TO_REACH = {Case(8, 0): 1.3, Case(8, 8): 4.0, Case(32, 32): 8.0}  # ours / theirs


@dataclass(frozen=True, slots=True)
class Answer:
    """One batch: how fast, and each request's first token."""

    tokens_per_s: float
    first_tokens: list[int]


Run = Callable[[Case, list[list[int]]], Answer]


class Theirs:
    """transformers' model, and a second one with every adapter loaded by PEFT."""

    def __init__(self, shape: BenchShape, adapters: BenchStore, lengths: Lengths) -> None:
        self._lengths = lengths
        self._bare = _load(shape)
        model = PeftModel.from_pretrained(_load(shape), adapters.folder(0), "a0")
        for index in range(1, MAX_ROWS):
            model.load_adapter(adapters.folder(index), f"a{index}")
        self._mixed = _ready(model)

    @torch.inference_mode()
    def run(self, case: Case, prompts: list[list[int]]) -> Answer:
        input_ids = torch.tensor(prompts)
        options: dict[str, Any] = {"max_new_tokens": self._lengths.new, "do_sample": False, "pad_token_id": 0}
        if case.num_adapters:
            options["adapter_names"] = [f"a{index % case.num_adapters}" for index in range(case.batch)]
        model = self._mixed if case.num_adapters else self._bare
        began_s = time.perf_counter()
        out = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)
        seconds = time.perf_counter() - began_s
        assert out.shape[1] == self._lengths.prompt + self._lengths.new, f"generate stopped early: {out.shape}"
        return Answer(case.batch * self._lengths.new / seconds, out[:, self._lengths.prompt].tolist())


def _load(shape: BenchShape) -> Any:
    return _ready(AutoModelForCausalLM.from_pretrained(base_folder(shape), dtype=torch.bfloat16, local_files_only=True))


def _ready(model: Any) -> Any:
    """In eval mode, and never stopping at an end-of-sequence token."""
    model.generation_config.eos_token_id = None
    return model.eval()


def turns(run: Run, case: Case, lengths: Lengths, vocab: int) -> Callable[[], Answer]:
    """The n-th turn of either side has the same prompts."""
    seeds = count()
    return lambda: run(case, random_prompts(case.batch, lengths.prompt, vocab, seed=next(seeds)))


def row_of(case: Case, ours: Sequence[Answer], theirs: Sequence[Answer]) -> Row:
    our_speeds, their_speeds = ([answer.tokens_per_s for answer in side] for side in (ours, theirs))
    pairs = [
        pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a.first_tokens, b.first_tokens, strict=True)
    ]
    return {
        "batch": case.batch,
        "adapters": case.num_adapters,
        "against": "PEFT adapter_names" if case.num_adapters else "transformers generate",
        **Spread.of(our_speeds).columns("ours_tok_per_s"),
        **Spread.of(their_speeds).columns("theirs_tok_per_s"),
        **ratio(our_speeds, their_speeds).columns("ours_over_theirs"),
        "same_first_token": sum(a == b for a, b in pairs) / len(pairs),
    }


def plot(report: Report, rows: Sequence[Row]) -> None:
    mixed = [number(row["ours_over_theirs"]) for row in rows if number(row["adapters"]) > 1]
    bare = [number(row["ours_over_theirs"]) for row in rows if row["adapters"] == 0]
    title = (
        f"Distinct adapters in one batch: {min(mixed):.1f} to {max(mixed):.1f} times PEFT's tokens per second; "
        f"bare base {min(bare):.1f} to {max(bare):.1f} times transformers'"
    )
    figure, (axes,) = report.figure(title, width_in=6.0)
    ratios = [f"{number(row['ours_over_theirs']):.1f}x" for row in rows]
    labels = [f"{case}\n{times}".replace(", ", "\n") for case, times in zip(CASES, ratios, strict=True)]
    series = {side: [spread(row, f"{side}_tok_per_s") for row in rows] for side in ("ours", "theirs")}
    bars(axes, labels, series)
    axes.set_ylabel("tokens per second, prefill included")
    legend_below(figure)
    report.save_plot(figure)


def print_summary(report: Report, rows: Sequence[Row]) -> None:
    columns = {
        "case": "{case}",
        "against": "{against}",
        "ours tok/s": "{ours_tok_per_s:.0f}",
        "theirs tok/s": "{theirs_tok_per_s:.0f}",
        "ratio": "{ours_over_theirs:.2f}",
        "min..max": "{ours_over_theirs_min:.2f}..{ours_over_theirs_max:.2f}",
        "to reach": "{to_reach}",
        "same first token": "{same_first_token:.0%}",
    }
    of_cases = [{"case": case, "to_reach": f">= {TO_REACH[case]}" if case in TO_REACH else ""} for case in CASES]
    shown = [row | of_case for row, of_case in zip(rows, of_cases, strict=True)]
    report.print_rows("Ours against PEFT and transformers, medians over rounds", shown, columns)


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("versus_peft", __doc__, arguments)
    shape, lengths = shape_for(quick=report.quick), lengths_for(quick=report.quick)
    adapters = bench_store(shape, MAX_ROWS, say=report.say)
    report.say(f"PEFT loads {MAX_ROWS} adapters")
    theirs = Theirs(shape, adapters, lengths)
    with bench_engine(shape, adapters.store, pool_adapters=MAX_ROWS, host_adapters=MAX_ROWS) as parts:

        def ours(case: Case, prompts: list[list[int]]) -> Answer:
            run = run_batch(parts.engine, prompts, case.adapters(adapters.digests), lengths)
            return Answer(run.tokens_per_s, [tokens[0] for tokens in run.tokens])

        sides: dict[str, Run] = {"ours": ours, "theirs": theirs.run}
        answers = interleaved(
            {
                f"{case}, {name}": turns(run, case, lengths, shape.vocab)
                for case in CASES
                for name, run in sides.items()
            },
            rounds=2 if report.quick else 7,
            say=report.say,
            show=lambda answer: f"{answer.tokens_per_s:.0f} tok/s",
        )
    adapters.close()
    rows = [row_of(case, answers[f"{case}, ours"], answers[f"{case}, theirs"]) for case in CASES]
    report.write_csv(rows)
    plot(report, rows)
    print_summary(report, rows)


if __name__ == "__main__":
    main()
