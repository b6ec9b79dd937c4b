"""A server under everything at once for hours: does its memory grow, does it ever fail, is it idle again afterwards.

Starts `multilora serve` on the demo's base with room for a fifth of the adapters. Eight tenants ask at Poisson times,
the first ten times as often as the others; adapters by Zipf; streams and not; late deadlines, bad requests, hang-ups.
Their owners upload, delete, canary, promote, roll back, rotate keys. All of that four times as often for two minutes,
then `--hours H` (8), `--load X` (1) times as often; SIGTERM ends it sooner, with what it has seen. A row a minute;
memory's slope is Theil and Sen's over the last four fifths. Ends with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx

from adapters_store.base.files import describe_base
from benchmarks.common.adapters import write_adapter
from benchmarks.common.report import Report, Row, legend_below, number, target_line
from benchmarks.common.timing import percentile
from benchmarks.serving.demo_server import ADMIN_KEY, DemoServer, MemoryMib, auth, demo_server
from benchmarks.soaking.changes import Content, Owner, push
from benchmarks.soaking.tenant import CHANGING, Tenant
from benchmarks.soaking.watch import ProcessSize, Slope, metric_values, theil_sen
from server.demo.assets import BASE_FOLDER, BASE_NAME
from server.engine.queueing.fair_share import jain_index

MEMORY = MemoryMib(kv_cache=24, adapter_pool=4, host_cache=8)  # nine adapters of 0.43 MB on the device, 18 in memory
WARM_UP = 0.2  # of the time: not counted for the slope
FEWEST_ROWS = 4  # for a slope
MOST_GROWTH_PERCENT_PER_H = 1.0
GAUGES = {
    "kv_usage": "multilora_kv_cache_usage_ratio",
    "running": "multilora_num_requests_running",
    "waiting": "multilora_num_requests_waiting",
    "adapters_resident": "multilora_adapters_resident",
    "host_bytes": "multilora_adapter_host_bytes",
    "evictions": "multilora_adapter_evictions_total/device",
    "jain_waiting": "multilora_fairness_jain",
}
COUNTS = ("sent", "answered", "hung_up", "late", "refused", "busy", "skipped", "tokens", "num_faults")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """contents: different adapters among all tenants. rate: a quiet tenant's requests a second. every_s: between rows.
    change_every_s: between one owner's changes. storm: times all of that, in the first storm_s before the soak."""

    seconds: float = 8 * 3600.0
    every_s: float = 60.0
    tenants: int = 8
    adapters: int = 6
    contents: int = 45
    rate: float = 1.0
    flood: float = 10.0
    change_every_s: float = 4.0
    storm: float = 4.0
    storm_s: float = 120.0

    def times(self, load: float) -> Scale:
        """All of it `load` times as often, the storm as it was."""
        every_s = self.change_every_s / load
        return replace(self, rate=load * self.rate, change_every_s=every_s, storm=max(1.0, self.storm / load))


QUICK_SCALE = Scale(seconds=2.0, every_s=0.4, adapters=3, contents=20, rate=2.0, change_every_s=0.4, storm_s=0.5)


class Soak:
    """One server, its tenants and their owners."""

    def __init__(self, client: httpx.AsyncClient, server: DemoServer, scale: Scale, contents: list[Content]) -> None:
        self._client, self._server, self._scale, self._contents = client, server, scale, contents
        models = [f"style-{index}" for index in range(scale.adapters)]
        self.tenants = [Tenant(f"tenant{index}", client, models, seed=index) for index in range(scale.tenants)]
        self.owners = [Owner(tenant, client, contents, seed=1000 + index) for index, tenant in enumerate(self.tenants)]
        self.models = models
        self.rows: list[Row] = []

    async def prepare(self) -> None:
        """Every tenant with a key and its adapters."""
        dice = random.Random(0)
        for tenant in self.tenants:
            body = {"name": tenant.name}
            made = await self._client.post("/admin/tenants", json=body, headers=auth(ADMIN_KEY))
            tenant.key = made.raise_for_status().json()["api_key"]
            for name in [*self.models, CHANGING]:
                pushed = await push(self._client, tenant.headers, name, dice.choice(self._contents))
                pushed.raise_for_status()

    async def answers(self) -> list[str]:
        """What every tenant's adapters say to one question, one after the other."""
        said = []
        for tenant in self.tenants:
            for model in [BASE_NAME, *self.models]:
                body = {"model": model, "prompt": "Why does sleep matter?", "max_tokens": 12, "temperature": 0}
                answer = await self._client.post("/v1/completions", json=body, headers=tenant.headers)
                said.append(str(answer.raise_for_status().json()["choices"][0]["text"]))
        return said

    async def live(self, seconds: float, load: float = 1.0) -> None:
        """All tenants ask and all owners change things, `load` times as often as the scale says."""
        scale, end_s = self._scale, time.perf_counter() + seconds
        async with asyncio.TaskGroup() as group:
            for index, (tenant, owner) in enumerate(zip(self.tenants, self.owners, strict=True)):
                rate = scale.rate * (1.0 if index else scale.flood)
                group.create_task(tenant.ask_until(end_s, load * rate))
                group.create_task(owner.change_until(end_s, scale.change_every_s / load))

    async def run(self, report: Report) -> None:
        living = asyncio.create_task(self._live_and_look(report))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, living.cancel)
        with suppress(asyncio.CancelledError):
            await living

    async def _live_and_look(self, report: Report) -> None:
        scale = self._scale
        report.say(f"{scale.storm_s:g} s at {scale.storm:g} times the load: what grows with the load has grown")
        await self.live(scale.storm_s, scale.storm)
        begin_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.live(scale.seconds))
            for count in range(1, int(scale.seconds / scale.every_s) + 1):
                await asyncio.sleep(max(0.0, begin_s + count * scale.every_s - time.perf_counter()))
                row = await self.look((time.perf_counter() - begin_s) / 3600)
                self.rows.append(row)
                report.say(" ".join(f"{name} {_short(value)}" for name, value in row.items()))

    async def look(self, hours: float) -> Row:
        """The process and the counts now."""
        metrics = metric_values((await self._client.get("/metrics")).text)
        ttfts = [ttft for tenant in self.tenants[1:] for ttft in tenant.seen.take_ttfts()]
        return {
            "hours": hours,
            **asdict(ProcessSize.of(self._server.pid)),
            **{name: metrics.get(metric, 0.0) for name, metric in GAUGES.items()},
            "quiet_ttft_p95_ms": 1000 * percentile(ttfts, 95) if ttfts else 0.0,
            **{name: sum(getattr(tenant.seen, name) for tenant in self.tenants) for name in COUNTS},
            "changes": sum(owner.num_made for owner in self.owners),
            "changes_refused": sum(owner.num_refused for owner in self.owners),
        }

    async def settle(self, timeout_s: float = 60.0) -> list[str]:
        """What the server still runs or holds waiting after the last request: nothing, as it should be."""
        end_s = time.perf_counter() + timeout_s
        while True:
            metrics = metric_values((await self._client.get("/metrics")).text)
            held = [f"{name} {metrics[GAUGES[name]]:g}" for name in ("running", "waiting") if metrics[GAUGES[name]]]
            if not held or time.perf_counter() > end_s:
                return held
            await asyncio.sleep(0.3)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{number(value):.0f}"


def made_contents(count: int, folder: Path) -> list[Content]:
    """Different adapters of the demo's base."""
    base = describe_base(BASE_FOLDER)
    return [Content.read(write_adapter(folder / str(seed), base, seed=seed)) for seed in range(count)]


async def measure(server: DemoServer, scale: Scale, contents: list[Content], report: Report) -> tuple[Soak, list[str]]:
    """The soak, and what was wrong with it."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        soak = Soak(client, server, scale, contents)
        await soak.prepare()
        before = await soak.answers()
        await soak.run(report)
        wrong = [f"still {held}" for held in await soak.settle()]
        if await soak.answers() != before:
            wrong.append("an answer is not what it was at the start")
    faults = [fault for tenant in soak.tenants for fault in tenant.seen.faults]
    return soak, wrong + faults


def slope_of(rows: Sequence[Row], column: str) -> Slope:
    """Over what comes after the warm-up."""
    counted = rows[int(WARM_UP * len(rows)) :]
    return theil_sen([number(row["hours"]) for row in counted], [number(row[column]) for row in counted])


def plot(report: Report, rows: Sequence[Row], title: str) -> None:
    figure, (memory, waiting) = report.figure(title, panels=2)
    hours = [number(row["hours"]) for row in rows]
    for column, label in (("rss_mb", "resident"), ("anon_mb", "its own")):
        memory.plot(hours, [number(row[column]) for row in rows], label=label)
    memory.set(title="memory of the server, MB", xlabel="hours")
    memory.set_ylim(bottom=0)
    target_line(memory, number(rows[int(WARM_UP * len(rows))]["anon_mb"]), "after warm-up")
    waiting.plot(hours, [number(row["quiet_ttft_p95_ms"]) for row in rows], color="#777777", label="TTFT p95")
    waiting.set(title="quiet tenants' TTFT p95, ms", xlabel="hours", ylim=(0, None))
    legend_below(figure)
    report.save_plot(figure)


def conclude(report: Report, soak: Soak, wrong: list[str]) -> None:
    """CSV, plot and table. Raises SystemExit if memory grows or anything went wrong."""
    if len(soak.rows) < FEWEST_ROWS:
        raise SystemExit(f"ended after {len(soak.rows)} rows; a slope needs {FEWEST_ROWS}")
    rows, last = soak.rows, soak.rows[-1]
    slopes = {name: slope_of(rows, name) for name in ("rss_mb", "anon_mb")}
    jain = jain_index([tenant.seen.tokens / max(1, tenant.seen.sent) for tenant in soak.tenants[1:]])
    title = f"{number(last['hours']):.2f} h, {last['answered']} answers: resident memory {slopes['rss_mb'].text}"
    report.write_csv(rows)
    plot(report, rows, title)
    table = [
        ["resident memory, of its median", slopes["rss_mb"].text],
        ["its own memory, of its median", slopes["anon_mb"].text],
        ["Jain index of quiet tenants' tokens a request", f"{jain:.4f}"],
        ["evictions from the device", _short(last["evictions"])],
        *[[name, _short(last[name])] for name in (*COUNTS, "changes", "changes_refused")],
        ["wrong", "; ".join(wrong) or "nothing"],
    ]
    report.print_table(title, ["", ""], table)
    if not report.quick and slopes["anon_mb"].low > MOST_GROWTH_PERCENT_PER_H:
        wrong.append(f"memory grows by {slopes['anon_mb'].text}; the limit is {MOST_GROWTH_PERCENT_PER_H} %/h")
    if wrong:
        raise SystemExit("\n".join(wrong))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hours", type=float, metavar="H", help="of the soak itself (8)")
    parser.add_argument("--load", type=float, default=1.0, metavar="X", help="all of it X times as often")
    report = Report.from_arguments("soak", __doc__, arguments, parser=parser)
    scale, hours = QUICK_SCALE if report.quick else Scale(), report.options.hours
    if hours is not None:
        scale = replace(scale, seconds=3600 * hours)
    scale = scale.times(report.options.load)
    with tempfile.TemporaryDirectory(prefix="multilora-bench-") as scratch:
        contents = made_contents(scale.contents, Path(scratch) / "contents")
        log = Path(scratch) / "server.log"
        with demo_server(Path(scratch) / "data", MEMORY, log=log) as server:
            soak, wrong = asyncio.run(measure(server, scale, contents, report))
        wrong += [line for line in log.read_text().splitlines() if " ERROR " in line][:10]
    conclude(report, soak, wrong)


if __name__ == "__main__":
    main()
