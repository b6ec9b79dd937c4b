"""The server under load: tenants stream completions over HTTP, on the base, on one adapter, each on its own, and Zipf.

Starts the API on 127.0.0.1 (auth off, tenants by X-Tenant-Id), pushes every tenant's adapter through the HTTP API, lets
locust run each popularity in turn, forwards and backwards, and stops everything. The clients share the server's cores.
"""

from __future__ import annotations

import csv
import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from benchmarks.common.adapters import BenchStore, bench_store
from benchmarks.common.report import Report, Row, bars, legend_below, number, ranged, spread
from benchmarks.common.shapes import shape_for
from benchmarks.common.timing import Spread, interleaved, percentile, ratio
from benchmarks.common.workload import Lengths, lengths_for
from benchmarks.serving.child import child

START_TIMEOUT_S = 120.0
LONGEST_RUN_S = 120  # of one load, on a machine that is too busy to end a request sooner
REPOSITORY = Path(__file__).parent.parent
POPULARITIES = ("base", "identical", "distinct", "zipf")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """tenants: each with its own adapter. pool: adapters that fit on the device. seconds: of one locust run."""

    users: int
    tenants: int
    pool: int
    seconds: int
    rounds: int


FULL_SCALE = Scale(users=8, tenants=64, pool=32, seconds=15, rounds=2)
QUICK_SCALE = Scale(users=2, tenants=3, pool=2, seconds=1, rounds=1)


@dataclass(frozen=True, slots=True)
class Load:
    """One locust run. requests: those answered to the end; a time per request in the lists."""

    tokens_per_s: float
    ttfts_s: list[float]
    tpots_s: list[float]
    requests: int


@contextmanager
def running_server(
    data_dir: Path, *, pool: int = 2, tenants: int = 2, quick: bool, as_served: bool = False
) -> Iterator[str]:
    """The server's URL; the process is gone when the block ends. pool, tenants: adapters that fit on the device, and in
    host memory. as_served: steps and prefix cache as `multilora serve` has them, instead of large steps and every
    prompt computed."""
    command = [sys.executable, "-m", "benchmarks.serving.server_process", "--data-dir", str(data_dir)]
    command += ["--pool-adapters", str(pool), "--host-adapters", str(tenants)]
    command += ["--quick"] * quick + ["--as-served"] * as_served
    with child(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
        url = process.stdout.readline().strip() if ready else ""
        if not url:
            raise RuntimeError(f"the server did not start within {START_TIMEOUT_S:.0f} s (exit {process.poll()})")
        yield url


def push_adapters(url: str, adapters: BenchStore, keys_file: Path, *, vocab: int) -> None:
    """One adapter per tenant through POST /v1/adapters; writes down each tenant's model."""
    with httpx.Client(base_url=url, timeout=60) as client:
        base = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        tenants = [f"tenant{index}" for index in range(len(adapters.versions))]
        for index, tenant in enumerate(tenants):
            folder = adapters.folder(index)
            files = {"config": (folder / CONFIG_FILE).read_bytes(), "weights": (folder / WEIGHTS_FILE).read_bytes()}
            answer = client.post("/v1/adapters", data={"name": "own"}, files=files, headers={"x-tenant-id": tenant})
            answer.raise_for_status()
    entries = [{"tenant": tenant, "model": "own", "api_key": None} for tenant in tenants]
    keys_file.write_text(json.dumps({"base": base, "vocab": vocab, "tenants": entries}))


def run_locust(url: str, popularity: str, *, keys_file: Path, scale: Scale, lengths: Lengths, seconds: int) -> Load:
    """One headless run, repeated with twice the time while no request came to its end in it. Raises as `_run_once`."""
    while True:
        load = _run_once(url, popularity, keys_file=keys_file, scale=scale, lengths=lengths, seconds=seconds)
        if load.requests > 0 or seconds > LONGEST_RUN_S:
            return load
        seconds *= 2


def _run_once(url: str, popularity: str, *, keys_file: Path, scale: Scale, lengths: Lengths, seconds: int) -> Load:
    """One headless run of the locust file. Raises RuntimeError if any request failed."""
    requests_csv = keys_file.with_name("requests.csv")
    requests_csv.unlink(missing_ok=True)
    options: Mapping[str, object] = {
        "--host": url,
        "--users": scale.users,
        "--spawn-rate": scale.users,
        "--run-time": f"{seconds}s",
        "--popularity": popularity,
        "--keys-file": keys_file,
        "--num-tenants": scale.users if popularity == "distinct" else 0,
        "--prompt-tokens": lengths.prompt,
        "--new-tokens": lengths.new,
        "--requests-csv": requests_csv,
        "--loglevel": "WARNING",
    }
    command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).parent / "serving" / "locustfile.py")]
    command += ["--headless", "--only-summary", *(str(part) for option in options.items() for part in option)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if not requests_csv.exists():
        raise RuntimeError(f"locust ended with {done.returncode}:\n{done.stderr[-2000:]}")
    with requests_csv.open() as file:
        return read_requests(list(csv.DictReader(file)), new_tokens=lengths.new)


def read_requests(rows: Sequence[Mapping[str, str]], *, new_tokens: int) -> Load:
    """Tokens of requests that the end of the run cut off count as well; their latencies do not."""
    errors = [row["error"] for row in rows if row["error"]]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(rows)} requests failed; the first: {errors[:1]}")
    if not rows:
        return Load(0.0, [], [], 0)
    whole = [row for row in rows if row["is_whole"] == "True"]
    seconds = max(float(row["last_s"]) for row in rows) - min(float(row["sent_s"]) for row in rows)
    return Load(
        sum(int(row["num_tokens"]) for row in rows) / seconds,
        [float(row["first_s"]) - float(row["sent_s"]) for row in whole],
        [(float(row["last_s"]) - float(row["first_s"])) / (new_tokens - 1) for row in whole],
        len(whole),
    )


def row_of(name: str, loads: Sequence[Load], base: Sequence[Load], scale: Scale) -> Row:
    speeds = [load.tokens_per_s for load in loads]
    ttfts = [1e3 * ttft for load in loads for ttft in load.ttfts_s]
    tpots = [1e3 * tpot for load in loads for tpot in load.tpots_s]
    return {
        "popularity": name,
        "users": scale.users,
        "tenants": {"base": 0, "identical": 1, "distinct": scale.users}.get(name, scale.tenants),
        "pool_adapters": scale.pool,
        "seconds": scale.seconds,
        "requests": sum(load.requests for load in loads),
        **Spread.of(speeds).columns("tok_per_s"),
        **ratio(speeds, [load.tokens_per_s for load in base]).columns("of_base"),
        **{f"ttft_p{percent}_ms": percentile(ttfts, percent) for percent in (50, 95, 99)},
        **{f"tpot_p{percent}_ms": percentile(tpots, percent) for percent in (50, 95, 99)},
    }


def plot(report: Report, rows: Sequence[Row]) -> None:
    zipf = rows[-1]
    title = (
        f"Over HTTP, {zipf['tenants']} tenants (Zipf 1.0, pool for {zipf['pool_adapters']}) keep "
        f"{100 * number(zipf['of_base']):.0f} % of the bare base's tokens per second, "
        f"TTFT p95 {number(zipf['ttft_p95_ms']):.0f} ms"
    )
    figure, (left, right) = report.figure(title, panels=2)
    labels = [f"{row['popularity']}\n({row['tenants']})" for row in rows]
    bars(left, labels, {"tokens per second, median of rounds": [spread(row, "tok_per_s") for row in rows]})
    left.set(
        ylabel="generated tokens per second",
        title=f"{zipf['users']} users, one request after another",
        xlabel="popularity (adapters)",
    )
    series = {
        f"TTFT p{percent}": [Spread.of([number(row[f"ttft_p{percent}_ms"])]) for row in rows] for percent in (50, 95)
    }
    bars(right, labels, series, first_colour=1)
    right.set(ylabel="time to first token, ms", title="all runs together", xlabel="popularity (adapters)")
    legend_below(figure)
    report.save_plot(figure)


def print_summary(report: Report, rows: Sequence[Row]) -> None:
    columns = {
        "popularity": "{popularity} ({tenants} adapters)",
        "requests": "{requests}",
        "tok/s": ranged("tok_per_s", 0),
        "of base": ranged("of_base"),
        "TTFT p50/95/99 ms": "{ttft_p50_ms:.0f} / {ttft_p95_ms:.0f} / {ttft_p99_ms:.0f}",
        "time per token p50/95/99 ms": "{tpot_p50_ms:.1f} / {tpot_p95_ms:.1f} / {tpot_p99_ms:.1f}",
    }
    report.print_rows("The server under load, through HTTP", rows, columns)


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("server_load", __doc__, arguments)
    scale, shape = QUICK_SCALE if report.quick else FULL_SCALE, shape_for(quick=report.quick)
    adapters = bench_store(shape, scale.tenants, say=report.say)
    with tempfile.TemporaryDirectory(prefix="multilora-bench-") as scratch:
        keys_file = Path(scratch) / "keys.json"
        data, quick = Path(scratch) / "data", report.quick
        with running_server(data, pool=scale.pool, tenants=scale.tenants, quick=quick) as url:
            report.say(f"pushing {scale.tenants} tenants' adapters to {url}")
            push_adapters(url, adapters, keys_file, vocab=shape.vocab)
            lengths = lengths_for(quick=report.quick)
            drive = partial(run_locust, url, keys_file=keys_file, scale=scale, lengths=lengths)
            report.say("warm-up")
            drive("zipf", seconds=min(5, scale.seconds))
            loads = interleaved(
                {name: partial(drive, name, seconds=scale.seconds) for name in POPULARITIES},
                rounds=scale.rounds,
                warmups=0,
                say=report.say,
                show=lambda load: f"{load.tokens_per_s:.0f} tok/s, {load.requests} requests",
            )
    adapters.close()
    rows = [row_of(name, loads[name], loads["base"], scale) for name in POPULARITIES]
    report.write_csv(rows)
    plot(report, rows)
    print_summary(report, rows)


if __name__ == "__main__":
    main()
