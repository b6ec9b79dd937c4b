"""A server that one of eight tenants floods: what the others wait for their first token, and how service is divided.

Starts the API on 127.0.0.1 (auth off, tenants by X-Tenant-Id) over the base alone and sends requests at Poisson times,
whether or not earlier ones are answered. "even": every tenant at three quarters of an eighth of what the server can do.
"share": the others the same, the first tenant always with as many requests as its share of the running slots, so the
server is full and no tenant has more than a share.
"flood": the first tenant at ten times the even rate. "one queue": the same flood, all in one tenant's name, as a server
without shares would see it. "backlog": every tenant beyond an eighth, the first at ten times that: how service is
divided. The first third of a case is not counted. With three cores or more, the clients have one to themselves: what
ten times as many connections cost their client cannot be changed by a server.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.common.report import Report, Row, bars, legend_below, number, spread
from benchmarks.common.shapes import shape_for
from benchmarks.common.timing import Spread, percentile, ratio
from benchmarks.server_load import running_server
from benchmarks.serving.server_process import MAX_ROWS
from server.engine.queueing.fair_share import jain_index

TENANTS = tuple(f"tenant{index}" for index in range(8))
FLOODER = TENANTS[0]
FLOOD = 10.0
REFUSALS = (429, 503)
CASES = ("even", "share", "flood", "one queue", "backlog")
OF_CAPACITY = {"even": 0.75, "share": 0.75, "flood": 0.75, "one queue": 0.75, "backlog": 1.5}


@dataclass(frozen=True, kw_only=True)
class Length:
    """seconds: of one case. Tokens of a request."""

    seconds: float
    rounds: int
    prompt: int
    new: int


FULL_LENGTH = Length(seconds=24.0, rounds=3, prompt=64, new=32)
QUICK_LENGTH = Length(seconds=1.0, rounds=1, prompt=8, new=4)


@dataclass
class Seen:
    """Of one tenant. served: virtual tokens given within the case, an input 1 and an output 2."""

    ttfts_s: list[float] = field(default_factory=list)
    served: float = 0.0
    refused: int = 0


class Clients:
    """All tenants' requests to one server."""

    def __init__(self, client: httpx.AsyncClient, model: str, length: Length, vocab: int) -> None:
        self._client = client
        self._model = model
        self._length = length
        self._vocab = vocab
        self._prompts = random.Random(0)
        self._end_s = 0.0
        self._count_from_s = 0.0

    async def run(self, case: str, rates: dict[str, float], seed: int) -> dict[str, Seen]:
        """Send for so long; what is unanswered then is hung up on. Raises what a request that failed raised."""
        seen = {tenant: Seen() for tenant in rates}
        rng = random.Random(seed)
        begin_s = time.perf_counter()
        self._end_s = begin_s + self._length.seconds
        self._count_from_s = begin_s + self._length.seconds / 3  # before, the first tenants hold all slots
        async with asyncio.TaskGroup() as group:
            for tenant, rate in rates.items():
                dice = random.Random(rng.random())
                if case == "share" and tenant == FLOODER:
                    group.create_task(self._keep_busy(tenant, MAX_ROWS // len(TENANTS), seen[tenant]))
                else:
                    group.create_task(self._send(tenant, rate, seen[tenant], dice, case))
        return seen

    async def _keep_busy(self, tenant: str, count: int, seen: Seen) -> None:
        """So many requests under way at all times."""

        async def loop() -> None:
            while True:
                await self._ask(tenant, self._prompt(), seen, time.perf_counter())

        async with asyncio.TaskGroup() as group:
            await self._hang_up_at_the_end([group.create_task(loop()) for _ in range(count)])

    async def capacity(self) -> float:
        """Requests a second that the server answers when all its slots are taken by requests at all stages: in step
        with each other, their prompts and then their tokens would come in larger, cheaper steps than any load's."""
        answered = 0
        count_from_s = time.perf_counter() + self._length.seconds / 4
        end_s = count_from_s + self._length.seconds / 2

        async def loop(index: int) -> None:
            nonlocal answered
            tenant, first_new = TENANTS[index % len(TENANTS)], 1 + index * self._length.new // MAX_ROWS
            await self._ask(tenant, self._prompt(), Seen(), 0.0, first_new)
            while time.perf_counter() < end_s:
                await self._ask(tenant, self._prompt(), Seen(), 0.0)
                answered += count_from_s <= time.perf_counter() < end_s

        await asyncio.gather(*(loop(index) for index in range(MAX_ROWS)))
        return answered / (end_s - count_from_s)

    async def _send(self, tenant: str, rate: float, seen: Seen, rng: random.Random, case: str) -> None:
        name = "everybody" if case == "one queue" else tenant
        under_way: set[asyncio.Task[None]] = set()
        due_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while (due_s := due_s + rng.expovariate(rate)) < self._end_s:
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                task = group.create_task(self._ask(name, self._prompt(), seen, due_s))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            await self._hang_up_at_the_end(under_way)

    async def _hang_up_at_the_end(self, under_way: Collection[asyncio.Task[None]]) -> None:
        await asyncio.sleep(max(0.0, self._end_s - time.perf_counter()))
        for task in under_way:
            task.cancel()

    def _prompt(self) -> list[int]:
        """A new prompt: arrivals are alike in every case of a round, and the prefix cache helps none."""
        return [self._prompts.randrange(2, self._vocab) for _ in range(self._length.prompt)]

    async def _ask(self, tenant: str, prompt: list[int], seen: Seen, due_s: float, new: int | None = None) -> None:
        try:
            await self._stream(tenant, prompt, seen, due_s, new or self._length.new)
        except (httpx.ReadError, httpx.RemoteProtocolError):  # beyond the server's cap of connections
            seen.refused += 1

    async def _stream(self, tenant: str, prompt: list[int], seen: Seen, due_s: float, new: int) -> None:
        body = {"model": self._model, "prompt": prompt, "max_tokens": new, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True}
        async with self._client.stream(
            "POST", "/v1/completions", json=body, headers={"x-tenant-id": tenant}
        ) as response:
            if response.status_code in REFUSALS:
                seen.refused += 1
                return
            response.raise_for_status()
            is_first = True
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                if line.startswith('data: {"error"'):
                    raise RuntimeError(f"within a stream: {line[:300]}")
                now_s = time.perf_counter()
                if is_first and due_s >= self._count_from_s:
                    seen.ttfts_s.append(now_s - due_s)
                if now_s >= self._count_from_s:
                    seen.served += (len(prompt) if is_first else 0) + 2.0
                is_first = False


def others_ms(seen: Sequence[dict[str, Seen]], percent: float) -> list[float]:
    """A percentile of the times to first token of all tenants but the first, round by round."""
    ttfts = [[ttft for tenant, own in each.items() if tenant != FLOODER for ttft in own.ttfts_s] for each in seen]
    return [1000 * percentile(each, percent) for each in ttfts]


def row_of(case: str, all_seen: dict[str, list[dict[str, Seen]]], rate: float) -> Row:
    """One case over all rounds; times of all tenants but the first."""
    seen, p95s_ms = all_seen[case], others_ms(all_seen[case], 95)
    jain = Spread.of([jain_index([own.served for own in each.values()]) for each in seen])
    return {
        "case": case,
        "rate_per_tenant": rate,
        **Spread.of(others_ms(seen, 50)).columns("ttft_p50_ms"),
        **Spread.of(p95s_ms).columns("ttft_p95_ms"),
        **ratio(p95s_ms, others_ms(all_seen["even"], 95)).columns("p95_of_even"),
        **ratio(p95s_ms, others_ms(all_seen["share"], 95)).columns("p95_of_share"),
        **jain.columns("jain"),
        "flooder_answered": sum(len(each[FLOODER].ttfts_s) for each in seen),
        "others_answered": sum(len(own.ttfts_s) for each in seen for own in each.values())
        - sum(len(each[FLOODER].ttfts_s) for each in seen),
        "refused": sum(own.refused for each in seen for own in each.values()),
    }


async def measure(url: str, report: Report, length: Length, vocab: int) -> list[Row]:
    """All cases in every round, every other round backwards."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        clients = Clients(client, model, length, vocab)
        await clients.capacity()  # warm-up
        most = max(await clients.capacity(), 1 / length.seconds)  # a busy machine may end no request of the quick form
        report.say(f"{most:.1f} requests a second at most")
        seen: dict[str, list[dict[str, Seen]]] = {case: [] for case in CASES}
        for number_of_round in range(length.rounds):
            for case in CASES if number_of_round % 2 == 0 else reversed(CASES):
                rate = OF_CAPACITY[case] * most / len(TENANTS)
                rates = dict.fromkeys(TENANTS, rate) | ({} if case in ("even", "share") else {FLOODER: FLOOD * rate})
                seen[case].append(await clients.run(case, rates, seed=number_of_round))
                report.say(f"round {number_of_round + 1}: {case}")
                await asyncio.sleep(0.5)
        return [row_of(case, seen, OF_CAPACITY[case] * most / len(TENANTS)) for case in CASES]


def main(arguments: Sequence[str] | None = None) -> None:
    report = Report.from_arguments("fairness", __doc__, arguments)
    length = QUICK_LENGTH if report.quick else FULL_LENGTH
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as server:
        if len(cores) > 2:
            server.callback(os.sched_setaffinity, 0, cores)
            os.sched_setaffinity(0, cores[:-1])  # for the server, which inherits it
        url = server.enter_context(running_server(Path(folder), quick=report.quick, as_served=True))
        if len(cores) > 2:
            os.sched_setaffinity(0, cores[-1:])
        rows = asyncio.run(measure(url, report, length, shape_for(quick=report.quick).vocab))
    report.write_csv(rows)
    show(report, rows)


def show(report: Report, rows: Sequence[Row]) -> None:
    """The plot and the table."""
    by_case = {str(row["case"]): row for row in rows}
    of_share, of_even = (spread(by_case["flood"], column).text() for column in ("p95_of_share", "p95_of_even"))
    jain = number(by_case["backlog"]["jain"])
    title = f"A tenfold flood: the others' p95 TTFT is {of_share} times what it is if the first uses its share, "
    title += f"{of_even} times an even load's; Jain index of a backlog {jain:.3f}"
    figure, (waits, index) = report.figure(title, panels=2)
    labels = CASES[:4]
    series = {
        "median": [spread(by_case[case], "ttft_p50_ms") for case in labels],
        "95th percentile": [spread(by_case[case], "ttft_p95_ms") for case in labels],
    }
    bars(waits, labels, series)
    waits.set_yscale("log")
    waits.set_title("others' time to first token, ms")
    bars(index, ["backlog"], {"Jain index of service": [spread(by_case["backlog"], "jain")]}, first_colour=2)
    index.set_ylim(0, 1.1)
    index.set_title("how service is divided")
    legend_below(figure)
    report.save_plot(figure)
    columns: tuple[str, ...] = ("ttft_p50_ms", "ttft_p95_ms", "p95_of_even", "p95_of_share", "jain")
    columns += ("flooder_answered", "others_answered", "refused")
    report.print_rows(title, rows, {"case": "{case}"} | {column: f"{{{column}:.4g}}" for column in columns})


if __name__ == "__main__":
    main()
