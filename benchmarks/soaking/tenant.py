"""One tenant of a soak: its requests, good and bad, and what came back. Knows HTTP; knows no other tenant.

What no client may see is a fault: a 5xx that was not asked for, an error within a stream, an answer to a request that
had to be refused, a broken connection.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.serving.demo_server import auth
from server.demo.assets import BASE_NAME, SHOWCASE_PROMPTS

MOST_UNDER_WAY = 64
MOST_FAULTS_KEPT = 10
CHANGING = "changing"  # the name whose meaning the tenant keeps changing
BAD_BODIES: tuple[dict[str, Any], ...] = (
    {"model": "nobody"},
    {"model": BASE_NAME, "temperature": 9},
    {"model": BASE_NAME, "max_tokens": 10_000_000},
    {"model": BASE_NAME, "n": 0},
    {"model": BASE_NAME, "tools": [{}]},
    {"model": BASE_NAME, "logit_bias": {"x": 1}},
    {"model": BASE_NAME, "prompt": [-1]},
)


@dataclass
class Seen:
    """Counts since the start; ttfts_s: seconds to the first token of streams, since the last call that took them."""

    ttfts_s: list[float] = field(default_factory=list)
    sent: int = 0
    answered: int = 0
    hung_up: int = 0
    late: int = 0
    refused: int = 0
    busy: int = 0
    skipped: int = 0
    tokens: int = 0
    num_faults: int = 0
    faults: list[str] = field(default_factory=list)

    def fault(self, what: str) -> None:
        self.num_faults += 1
        if len(self.faults) < MOST_FAULTS_KEPT:
            self.faults.append(what)

    def take_ttfts(self) -> list[float]:
        taken, self.ttfts_s = self.ttfts_s, []
        return taken


class Tenant:
    """Asks at Poisson times, whether or not earlier requests are answered, MOST_UNDER_WAY at once at most."""

    def __init__(self, name: str, client: httpx.AsyncClient, models: Sequence[str], seed: int) -> None:
        """models: the most popular first."""
        self.name, self.key, self.seen = name, "", Seen()
        self._client, self._dice = client, random.Random(seed)
        self._models = models
        self._weights = [1.0 / (rank + 1) for rank in range(len(models))]

    @property
    def headers(self) -> dict[str, str]:
        return auth(self.key)

    async def ask_until(self, end_s: float, rate: float) -> None:
        """rate: requests a second. Returns when all are answered."""
        due_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            under_way: set[asyncio.Task[None]] = set()
            while (due_s := due_s + self._dice.expovariate(rate)) < end_s:
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                if len(under_way) >= MOST_UNDER_WAY:
                    self.seen.skipped += 1
                    continue
                task = group.create_task(self.ask())
                under_way.add(task)
                task.add_done_callback(under_way.discard)

    async def ask(self) -> None:
        """One request of some kind."""
        self.seen.sent += 1
        kind = self._dice.random()
        try:
            if kind < 0.03:
                await self._ask_badly()
            elif kind < 0.06:
                await self._stream(self._body(stream=True), timeout_ms=self._dice.randrange(1, 200))
            elif kind < 0.10:
                await self._hang_up()
            elif kind < 0.65:
                await self._stream(self._body(stream=True))
            else:
                await self._wait(self._body())
        except httpx.HTTPError as error:
            self.seen.fault(f"{self.name}: {type(error).__name__}: {error}")

    def _body(self, *, stream: bool = False) -> dict[str, Any]:
        dice = self._dice
        drawn = dice.random()
        named = BASE_NAME if drawn < 0.15 else CHANGING
        return {
            "model": named if drawn < 0.25 else dice.choices(self._models, self._weights)[0],
            "messages": [{"role": "user", "content": dice.choice(SHOWCASE_PROMPTS)}],
            "max_tokens": dice.randrange(4, 48),
            "temperature": dice.choice([0.0, 0.8]),
            "n": dice.choice([1, 1, 1, 2]),
            "logprobs": dice.random() < 0.1,
            "user": f"user{dice.randrange(1000)}",
            **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
        }

    async def _ask_badly(self) -> None:
        body = {"prompt": "x", **self._dice.choice(BAD_BODIES)}
        answer = await self._client.post("/v1/completions", json=body, headers=self.headers)
        if not 400 <= answer.status_code < 500:
            self.seen.fault(f"{self.name}: {answer.status_code} for {body}: {answer.text[:300]}")
        self.seen.refused += 1

    async def _wait(self, body: dict[str, Any]) -> None:
        answer = await self._client.post("/v1/chat/completions", json=body, headers=self.headers)
        if self._is_served(answer.status_code, answer.text, body):
            self.seen.answered += 1
            self.seen.tokens += answer.json()["usage"]["completion_tokens"]

    async def _stream(self, body: dict[str, Any], *, timeout_ms: int | None = None) -> None:
        headers = self.headers | ({} if timeout_ms is None else {"x-request-timeout-ms": str(timeout_ms)})
        start_s, is_first, is_late = time.perf_counter(), True, False
        async with self._client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode()
                self._is_served(answer.status_code, text, body, may_be_late=timeout_ms is not None)
                return
            async for line in answer.aiter_lines():
                if line.startswith('data: {"error"'):
                    is_late = timeout_ms is not None and "deadline_exceeded" in line
                    if not is_late:
                        self.seen.fault(f"{self.name}: within a stream: {line[:300]}")
                elif '"usage":{' in line:
                    self.seen.tokens += json.loads(line[6:])["usage"]["completion_tokens"]
                elif is_first and '"content":"' in line and '"content":""' not in line:
                    is_first = False
                    if timeout_ms is None:
                        self.seen.ttfts_s.append(time.perf_counter() - start_s)
        self.seen.late += is_late
        self.seen.answered += not is_late

    async def _hang_up(self) -> None:
        """Before the answer begins, or within it."""
        self.seen.hung_up += 1
        body = self._body(stream=self._dice.random() < 0.7) | {"max_tokens": 200}
        try:
            async with (
                asyncio.timeout(self._dice.uniform(0.005, 0.4)),
                self._client.stream("POST", "/v1/chat/completions", json=body, headers=self.headers) as answer,
            ):
                self._is_served(answer.status_code, "", body)
                async for _ in answer.aiter_lines():
                    if self._dice.random() < 0.2:
                        return
        except TimeoutError:
            return

    def _is_served(self, status: int, text: str, body: dict[str, Any], *, may_be_late: bool = False) -> bool:
        """Count what is not a 200. A name that is being changed may be gone; a flood may get 429."""
        if status == 200:
            return True
        if status == 429:
            self.seen.busy += 1
        elif status == 504 and may_be_late:
            self.seen.late += 1
        elif status == 404 and body["model"] == CHANGING:
            self.seen.refused += 1
        else:
            self.seen.fault(f"{self.name}: {status} for {json.dumps(body)[:200]}: {text[:300]}")
        return False
