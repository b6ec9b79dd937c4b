"""What a call of an adapter costs after a long conversation with the base: activated LoRA, ordinary LoRA, the base.

Each round computes a new conversation on the base, then times the first token of one more turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from adapters_store.base.description import AdapterDigest
from benchmarks.common.adapters import bench_store
from benchmarks.common.report import Report, Row, number, ranged
from benchmarks.common.shapes import shape_for
from benchmarks.common.timing import Spread, interleaved, ratio
from benchmarks.common.workload import bench_engine, make_request, random_prompts
from server.engine.engine import Engine

TURN = 32  # tokens of the last turn
TARGETS = {"base": 1.0, "activated": 1.2, "ordinary": 10.0}  # activated / base; ordinary / activated


@dataclass(frozen=True, slots=True)
class Turn:
    """The first token of the last turn, and how much of its prompt was computed before."""

    ttft_s: float
    num_cached: int


def turns(
    engine: Engine, adapter: AdapterDigest | None, length: int, vocab: int, *, is_activated: bool
) -> Callable[[], Turn]:
    """A turn that is new to the case, after a conversation of `length` tokens that is computed."""
    seeds = count()

    def run() -> Turn:
        [prompt] = random_prompts(1, length + TURN, vocab, seed=next(seeds))
        first_token(engine, prompt[:length], None, active_from=0)
        return first_token(engine, prompt, adapter, active_from=length if is_activated else 0)

    return run


def first_token(engine: Engine, prompt: list[int], adapter: AdapterDigest | None, *, active_from: int) -> Turn:
    request = make_request(prompt, adapter, max_tokens=1)
    request.active_from = active_from
    began_s = time.perf_counter()
    engine.add(request)
    while True:
        for event in engine.step():
            if event.finish_reason is not None:
                assert event.error is None, event.error
                return Turn(time.perf_counter() - began_s, event.num_cached_tokens)


def rows_of(runs: dict[str, list[Turn]], length: int) -> list[Row]:
    times = {name: [turn.ttft_s for turn in own] for name, own in runs.items()}
    return [
        {
            "case": name,
            "conversation": length,
            "cached": own[-1].num_cached,
            "target": TARGETS[name],
            **Spread.of([1e3 * ttft_s for ttft_s in times[name]]).columns("ttft_ms"),
            **ratio(times[name], times["base"]).columns("of_base"),
            **ratio(times["ordinary"], times[name]).columns("ordinary_over_it"),
        }
        for name, own in runs.items()
    ]


def print_summary(report: Report, rows: Sequence[Row]) -> None:
    columns = {
        "turn on": "{case}",
        "cached tokens": "{cached}",
        "ms (min..max)": ranged("ttft_ms", 0),
        "of the base's": "{of_base:.2f}",
        "LoRA's over it": "{ordinary_over_it:.1f}",
    }
    title = f"First token after {rows[0]['conversation']} tokens of a base conversation, medians over rounds"
    report.print_rows(title, rows, columns)


def plot(report: Report, rows: Sequence[Row]) -> None:
    by_case = {str(row["case"]): number(row["ttft_ms"]) for row in rows}
    sooner = by_case["ordinary"] / by_case["activated"]
    figure, [axes] = report.figure(f"An activated adapter answers {sooner:.0f} times sooner than LoRA")
    axes.bar(list(by_case), list(by_case.values()))
    axes.set_ylabel("ms to the first token")
    axes.set_yscale("log")
    report.save_plot(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("activated_lora", __doc__, arguments)
    shape, length = shape_for(quick=report.quick), 192 if report.quick else 4000
    adapters = bench_store(shape, 1, say=report.say)
    [digest] = adapters.digests[:1]
    with bench_engine(shape, adapters.store, pool_adapters=1, host_adapters=1, prefix_cache=True) as parts:
        cases = {"base": (None, False), "activated": (digest, True), "ordinary": (digest, False)}
        runs = interleaved(
            {
                name: turns(parts.engine, adapter, length, shape.vocab, is_activated=is_activated)
                for name, (adapter, is_activated) in cases.items()
            },
            rounds=2 if report.quick else 5,
            say=report.say,
            show=lambda turn: f"{1e3 * turn.ttft_s:.0f} ms, {turn.num_cached} tokens cached",
        )
    adapters.close()
    rows = rows_of(runs, length)
    report.write_csv(rows)
    plot(report, rows)
    print_summary(report, rows)


if __name__ == "__main__":
    main()
