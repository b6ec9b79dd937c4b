"""Ours beside one peer, through HTTP: tries the peer's settings, keeps the best, then measures both in turn.

Each round runs every load on both servers with the same prompts. Both servers run all the time; the one that is not
asked is idle, after a moment. `busy`: other programs that use a core each meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

from benchmarks.common.adapters import bench_store
from benchmarks.common.machine import hardware
from benchmarks.common.report import Report, Row, bars, legend_below, number, spread
from benchmarks.common.shapes import BenchShape, shape_for
from benchmarks.common.timing import Spread, interleaved, ratio
from benchmarks.peers.loads import (
    FULL_LOADS,
    QUICK_LOADS,
    TRIAL_LOADS,
    Load,
    MakeAsk,
    Outcome,
    busy_processes,
    run_load,
    warm_up,
)
from benchmarks.peers.servers import Ours, OursHere, Side
from benchmarks.peers.venvs import peers_folder

MakePeer = Callable[[Report, BenchShape, Sequence[Path], Path], Side]  # installs it; adapters' folders, its log
OURS, THEIRS = "ours", "theirs"
SETTLE_S = 2.0  # before each turn: vLLM's workers spin on a core for a second after its last answer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure. busy: other programs beside, for each part of the run. setting: the peer's, None: try them."""

    loads: Sequence[Load]
    rounds: int
    busy: Sequence[int]
    try_again: bool
    setting: str | None

    @property
    def num_adapters(self) -> int:
        return max(load.adapters for load in self.loads)


def compare(
    name: str, about: str | None, make_peer: MakePeer, arguments: Sequence[str] | None, *, has_schemas: bool
) -> None:
    """The whole benchmark `name`: one CSV, one plot and one table for each number of busy programs beside. has_schemas:
    whether the peer's completions take `response_format`."""
    report, plan = _options(name, about, arguments)
    plan = replace(plan, loads=[load for load in plan.loads if has_schemas or load.schema is None])
    shape = shape_for(quick=report.quick)
    store = bench_store(shape, plan.num_adapters, say=report.say)
    folders = [store.folder(index) for index in range(plan.num_adapters)]
    names = [version.name for version in store.versions]
    store.close()
    with tempfile.TemporaryDirectory(prefix="multilora-bench-") as scratch:
        ours = (OursHere if report.quick else Ours)(shape, names, Path(scratch) / "ours.log")
        peer = ours if report.quick else make_peer(report, shape, folders, Path(scratch) / "peer.log")
        settings = {busy: _best_setting(report, peer, shape, busy, plan) for busy in plan.busy}
        for busy in plan.busy:
            with _both(ours, peer, settings[busy], quick=report.quick) as sides:
                rows = _measure(report, sides, plan, shape, busy, settle_s=0.0 if report.quick else SETTLE_S)
            _show(
                replace(report, name=name if busy == 0 else f"{name}_busy{busy}"), rows, peer.name, settings[busy], busy
            )


def _options(name: str, about: str | None, arguments: Sequence[str] | None) -> tuple[Report, Plan]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--busy", type=int, nargs="+", metavar="N", help="programs beside, for each run (0 1)")
    parser.add_argument("--rounds", type=int, metavar="N")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="loads with this text in their names")
    parser.add_argument("--try-again", action="store_true", help="try the peer's settings, also if they are known")
    parser.add_argument("--setting", metavar="TEXT", help="the peer's; else all are tried once")
    report = Report.from_arguments(name, about, arguments, parser=parser)
    options, known = report.options, QUICK_LOADS if report.quick else FULL_LOADS
    loads = [load for load in known if any(text in load.name for text in options.only)]
    busy = options.busy or ([0] if report.quick else [0, 1])
    rounds = options.rounds or (2 if report.quick else 3)
    return report, Plan(loads=loads, rounds=rounds, busy=busy, try_again=options.try_again, setting=options.setting)


def _best_setting(report: Report, peer: Side, shape: BenchShape, busy: int, plan: Plan) -> str:
    """The setting with the largest product of tokens/s and prompts/s. Kept beside the peer for this machine."""
    if plan.setting is not None or len(peer.settings) == 1:
        return plan.setting or peer.settings[0]
    file, key = peers_folder() / f"{report.name}.json", f"{hardware()}, {busy} busy"
    known: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    if plan.try_again or set(known.get(key, {})) != set(peer.settings):
        known[key] = {setting: _trial(report, peer, setting, shape, busy) for setting in peer.settings}
        file.write_text(json.dumps(known, indent=1))
    report.say(f"{peer.name} with {busy} busy beside, speeds of its settings: {known[key]}")
    return max(known[key], key=known[key].__getitem__)


def _trial(report: Report, peer: Side, setting: str, shape: BenchShape, busy: int) -> float:
    """Geometric mean of tokens/s and prompt tokens/s."""
    with peer.running(setting, adapters=False) as ask:
        warm_up(ask, shape.vocab, adapters=0)
        with busy_processes(busy):
            decode, prompt = (run_load(load, ask, shape.vocab, seed=9) for load in TRIAL_LOADS)
    prompt_speed = 1e3 * TRIAL_LOADS[1].prompt / prompt.ttft_ms
    report.say(f"tried {setting}: {decode.tokens_per_s:.0f} tok/s, prompt of 512 {prompt.ttft_ms:.0f} ms")
    return math.sqrt(decode.tokens_per_s * prompt_speed)


@contextmanager
def _both(ours: Side, peer: Side, setting: str, *, quick: bool) -> Iterator[Mapping[str, MakeAsk]]:
    """quick: one server of ours is both sides."""
    with ExitStack() as stack:
        mine = stack.enter_context(ours.running(ours.settings[0]))
        yield {OURS: mine, THEIRS: mine if quick else stack.enter_context(peer.running(setting))}


def _measure(
    report: Report, sides: Mapping[str, MakeAsk], plan: Plan, shape: BenchShape, busy: int, *, settle_s: float
) -> list[Row]:
    report.say("warm-up")
    for ask in sides.values():
        warm_up(ask, shape.vocab, adapters=plan.num_adapters)

    def turns(load: Load, side: str) -> Callable[[], Outcome]:
        """The n-th turn of either side has the same prompts. No other load has them: prefix caches would know them."""
        seeds = count(1000 * plan.loads.index(load))

        def run() -> Outcome:
            time.sleep(settle_s)
            with busy_processes(busy):
                return run_load(load, sides[side], shape.vocab, seed=next(seeds))

        return run

    cases = {f"{load.name}, {side}": turns(load, side) for load in plan.loads for side in sides}
    outcomes = interleaved(cases, rounds=plan.rounds, warmups=0, say=report.say, show=_short)
    of = partial(_row, busy=busy)
    return [of(load, outcomes[f"{load.name}, {OURS}"], outcomes[f"{load.name}, {THEIRS}"]) for load in plan.loads]


def _short(outcome: Outcome) -> str:
    return (
        f"{outcome.tokens_per_s:.1f} tok/s, first token {outcome.ttft_ms:.0f} ms, then {outcome.token_ms:.1f} ms each"
    )


def _row(load: Load, ours: Sequence[Outcome], theirs: Sequence[Outcome], *, busy: int) -> Row:
    """times_as_fast: our tokens/s over theirs; of prompts their time over ours."""
    row: Row = {"load": load.name, "clients": load.clients, "adapters": load.adapters, "prompt": load.prompt}
    row |= {"new": load.new, "busy": busy, "unit": "ms" if load.is_prompt else "tok/s"}
    values = [[out.ttft_ms if load.is_prompt else out.tokens_per_s for out in side] for side in (ours, theirs)]
    for side, own in zip((OURS, THEIRS), values, strict=True):
        row |= Spread.of(own).columns(side)
    row |= ratio(*(reversed(values) if load.is_prompt else values)).columns("times_as_fast")
    for side, own_outcomes in ((OURS, ours), (THEIRS, theirs)):
        for column in ("ttft_ms", "token_ms", "token_p95_ms"):
            row |= {f"{side}_{column}": Spread.of([getattr(out, column) for out in own_outcomes]).median}
    return row


def _show(report: Report, rows: Sequence[Row], peer: str, setting: str, busy: int) -> None:
    report.write_csv([row | {"peer": peer, "peer_setting": setting} for row in rows])
    _plot(report, rows, peer)
    title = f"multilora beside {peer} ({setting}), medians of rounds"
    title += f", {busy} other program(s) busy" if busy else ""
    columns = {
        "load": "{load}",
        "unit": "{unit}",
        "multilora": "{ours:.1f}",
        peer: "{theirs:.1f}",
        "times as fast": "{times_as_fast:.2f}",
        "min..max": "{times_as_fast_min:.2f}..{times_as_fast_max:.2f}",
        "first token, ms": "{ours_ttft_ms:.0f} / {theirs_ttft_ms:.0f}",
        "next token, ms": "{ours_token_ms:.0f} / {theirs_token_ms:.0f}",
    }
    report.print_rows(title, rows, columns)


def _plot(report: Report, rows: Sequence[Row], peer: str) -> None:
    times = [number(row["times_as_fast"]) for row in rows]
    figure, (axes,) = report.figure(
        f"multilora {min(times):.1f} to {max(times):.1f} times as fast as {peer}", width_in=9.0
    )
    labels = [str(row["load"]).replace(", ", "\n") for row in rows]
    bars(axes, labels, {"times as fast as the peer (1: equal)": [spread(row, "times_as_fast") for row in rows]})
    axes.axhline(1.0, color="#444444", linewidth=0.9, linestyle="--")
    axes.tick_params(axis="x", labelsize=5)
    legend_below(figure)
    report.save_plot(figure)
