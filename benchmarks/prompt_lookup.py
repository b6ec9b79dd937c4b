"""What guessing tokens from a request's own text gains and costs: the same engine with prompt lookup and without.

A bias makes the answers: one token again and again (every guess is right), four tokens in random order (three guesses
of four are wrong), or no bias (nothing repeats). The work of the model is the same in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

from benchmarks.common.adapters import bench_store
from benchmarks.common.drafts import DraftRun, draft_run, drafts_row, plot_drafts, print_drafts
from benchmarks.common.report import Report, number
from benchmarks.common.shapes import shape_for
from benchmarks.common.timing import interleaved
from benchmarks.common.workload import bench_engine, make_request, random_prompts
from server.engine.engine import Engine
from server.engine.schedule import CPU_STEP
from server.engine.scheduling.prompt_lookup import PromptLookup


@dataclass(frozen=True, slots=True)
class Case:
    """num_tokens: how many tokens the answers are made of; 0: of any."""

    name: str
    num_requests: int
    num_tokens: int
    target: float  # tokens per second with prompt lookup / without


CASES = [
    Case("repeats", 1, 1, 1.8),
    Case("wrong guesses", 1, 4, 0.98),
    Case("nothing repeats", 1, 0, 0.98),
    Case("4 requests repeat", 4, 1, 1.0),
    Case("32 requests repeat", 32, 1, 0.98),
]


def runner(engine: Engine, case: Case, vocab: int, num_new: int, *, most: int) -> Callable[[], DraftRun]:
    """Prompts and seeds are the same with and without guesses, and new in each round."""
    seeds = count()

    def run() -> DraftRun:
        seed = next(seeds)
        engine.scheduler.lookup = PromptLookup(most, engine.scheduler.pool)
        bias = tuple((token, 100.0) for token in range(10, 10 + case.num_tokens))
        requests = [
            make_request(prompt, None, num_new) for prompt in random_prompts(case.num_requests, 32, vocab, seed=seed)
        ]
        for index, request in enumerate(requests):
            request.params = replace(request.params, logit_bias=bias, temperature=1.5, seed=seed + index)
        return draft_run(engine, [requests])

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("prompt_lookup", __doc__, arguments)
    shape, num_new = shape_for(quick=report.quick), 24 if report.quick else 96
    adapters = bench_store(shape, 1, say=report.say)
    with bench_engine(shape, adapters.store, pool_adapters=1, host_adapters=1) as parts:
        most = CPU_STEP.drafts
        runs = interleaved(
            {
                f"{case.name}, {'guesses' if guesses else 'none'}": runner(
                    parts.engine, case, shape.vocab, num_new if case.num_requests < 32 else 24, most=guesses
                )
                for case in CASES
                for guesses in (0, most)
            },
            rounds=2 if report.quick else 5,
            say=report.say,
            show=lambda run: f"{run.tokens_per_s:.1f} tok/s",
        )
    adapters.close()
    rows = [
        drafts_row(case.name, case.target, runs[f"{case.name}, none"], runs[f"{case.name}, guesses"], drafts="guessed")
        for case in CASES
    ]
    report.write_csv(rows)
    title = f"An answer that repeats its own text comes {number(rows[0]['ratio']):.1f} times as fast"
    plot_drafts(report, rows, title, drafts="prompt lookup")
    print_drafts(report, "Prompt lookup, medians over rounds", rows, drafts="guessed", digits=1)


if __name__ == "__main__":
    main()
