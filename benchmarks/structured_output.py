"""What a grammar costs: all rows constrained by a JSON schema against free rows, same lengths, 8 and 32 at once.

Beside it: the time that a new grammar takes to be checked and compiled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from benchmarks.common.adapters import bench_store
from benchmarks.common.report import Report, Row, number, ranged
from benchmarks.common.shapes import shape_for
from benchmarks.common.timing import Spread, interleaved, percentile, ratio
from benchmarks.common.workload import BatchRun, bench_engine, lengths_for, new_batches
from server.engine.grammar.compiler import AskedGrammar, GrammarCompiler, compiler_for
from server.engine.grammar.spec import GrammarSpec
from server.engine.request import TokenConstraint

TARGETS = {8: 0.97, 32: 0.93}  # tok/s of constrained rows / of free rows
NUM_GRAMMARS = 200
ENDLESS = {"type": "array", "items": {"type": "string"}, "minItems": 10_000}  # no answer ends within the lengths


def asked(schema: object) -> AskedGrammar:
    return AskedGrammar("response_format", GrammarSpec("json_schema", json.dumps(schema)))


def person(number_of_fields: int) -> object:
    """A schema that no other number gives, as a tenant's tool or form has it."""
    fields = {f"field_{index}": {"type": ("string", "integer", "boolean")[index % 3]} for index in range(3)}
    own = {f"own_{number_of_fields}": {"enum": [f"a{number_of_fields}", f"b{number_of_fields}"]}}
    properties = fields | own
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def compile_times_ms(compiler: GrammarCompiler, count: int) -> list[float]:
    times = []
    compiler.compiled("bench", asked(person(-1)))  # starts the checker's process
    for index in range(count):
        start_s = time.perf_counter()
        compiler.compiled("bench", asked(person(index)))
        times.append(1e3 * (time.perf_counter() - start_s))
    return times


def row_of(batch: int, constrained: Sequence[BatchRun], free: Sequence[BatchRun]) -> Row:
    speeds = [run.tokens_per_s for run in constrained]
    decode, free_decode = [run.decode_tokens_per_s for run in constrained], [run.decode_tokens_per_s for run in free]
    return {
        "batch": batch,
        "target": TARGETS[batch],
        **Spread.of([run.tokens_per_s for run in free]).columns("free_tok_per_s"),
        **Spread.of(speeds).columns("tok_per_s"),
        **ratio(speeds, [run.tokens_per_s for run in free]).columns("of_free"),
        **ratio(decode, free_decode).columns("decode_of_free"),
    }


def print_summary(report: Report, rows: Sequence[Row]) -> None:
    columns = {
        "rows": "{batch}",
        "free tok/s": "{free_tok_per_s:.0f}",
        "constrained": "{tok_per_s:.0f}",
        "of free (min..max)": ranged("of_free"),
        "decode": "{decode_of_free:.2f}",
        "to reach": "{target:.2f}",
        "new grammar p50/p99 ms": "{compile_p50_ms:.1f} / {compile_p99_ms:.1f}",
    }
    report.print_rows("Rows under a JSON schema, medians over rounds", rows, columns)


def plot(report: Report, rows: Sequence[Row]) -> None:
    kept = " and ".join(f"{100 * number(row['of_free']):.0f} % ({number(row['batch']):.0f} rows)" for row in rows)
    figure, [axes] = report.figure(f"Rows under a JSON schema keep {kept} of tokens per second", width_in=4.2)
    axes.bar([f"{number(row['batch']):.0f} rows" for row in rows], [number(row["of_free"]) for row in rows])
    axes.set_ylabel("tok/s constrained / tok/s free")
    report.save_plot(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("structured_output", __doc__, arguments)
    shape, lengths = shape_for(quick=report.quick), lengths_for(quick=report.quick)
    adapters = bench_store(shape, 1, say=report.say)
    with bench_engine(shape, adapters.store, pool_adapters=1, host_adapters=1) as parts:
        compiler = compiler_for(parts.worker.tokenizer, parts.worker.vocabulary)
        times_ms = compile_times_ms(compiler, 5 if report.quick else NUM_GRAMMARS)
        endless = compiler.compiled("bench", asked(ENDLESS))
        ways: dict[str, Callable[[], TokenConstraint | None]] = {
            "free": lambda: None,
            "constrained": lambda: endless.start(()),
        }
        runs = interleaved(
            {
                f"{batch} rows, {name}": new_batches(parts.engine, [None] * batch, lengths, shape.vocab, constrain)
                for batch in TARGETS
                for name, constrain in ways.items()
            },
            rounds=2 if report.quick else 7,
            say=report.say,
            show=lambda run: f"{run.tokens_per_s:.0f} tok/s",
        )
        compiler.close()
    adapters.close()
    compiling = {f"compile_p{percent}_ms": percentile(times_ms, percent) for percent in (50, 99)}
    rows = [
        {**row_of(batch, runs[f"{batch} rows, constrained"], runs[f"{batch} rows, free"]), **compiling}
        for batch in TARGETS
    ]
    report.write_csv(rows)
    plot(report, rows)
    print_summary(report, rows)


if __name__ == "__main__":
    main()
