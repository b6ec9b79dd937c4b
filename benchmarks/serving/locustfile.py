"""Tenants that stream completions from a running server, each with an adapter, chosen by popularity.

    locust -f benchmarks/serving/locustfile.py --headless --host http://127.0.0.1:8000 -u 16 -t 30s \\
        --keys-file keys.json

keys.json: {"base": ID, "vocab": N, "tenants": [{"tenant": T, "model": NAME, "api_key": KEY or null}]}. Every option can
come from the environment as well (BENCH_KEYS_FILE, ...). TTFT and TPOT (mean time per token after the first) are
events of their own in locust's statistics; --requests-csv keeps one line per request.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from locust import HttpUser, constant, events, task

sys.path.append(str(Path(__file__).parents[2]))  # locust loads this file by its path

from benchmarks.common.popularity import Popularity, choose_adapters

SEQUENCE = 100_000  # requests whose tenants are drawn ahead


@dataclass(slots=True)
class Answered:
    """One request, whole or cut off by the end of the test. Times: time.perf_counter() seconds of this process."""

    tenant: str
    sent_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0
    is_whole: bool = False
    error: str = ""

    def saw_token(self) -> None:
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s
        self.num_tokens += 1


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_arguments(parser: Any) -> None:
    parser.add_argument("--keys-file", env_var="BENCH_KEYS_FILE", default="", help="tenants, models and keys (JSON)")
    parser.add_argument(
        "--popularity", env_var="BENCH_POPULARITY", default="zipf", choices=["base", *get_args(Popularity)]
    )
    parser.add_argument("--num-tenants", env_var="BENCH_NUM_TENANTS", type=int, default=0, help="the first N; 0: all")
    parser.add_argument("--prompt-tokens", env_var="BENCH_PROMPT_TOKENS", type=int, default=64)
    parser.add_argument("--new-tokens", env_var="BENCH_NEW_TOKENS", type=int, default=32)
    parser.add_argument("--requests-csv", env_var="BENCH_REQUESTS_CSV", default="", help="one line per request")


class World:
    """What all users of one test share."""

    def __init__(self, options: Any) -> None:
        keys = json.loads(Path(options.keys_file).read_text())
        self.base: str = keys["base"]
        self.vocab: int = keys["vocab"]
        self.tenants: list[dict[str, str]] = keys["tenants"][: options.num_tenants or None]
        self.options = options
        self.answered: list[Answered] = []
        self._order = self._draw(options.popularity)

    def next_call(self) -> tuple[str, dict[str, str], str]:
        """(model, headers, tenant) of the next request."""
        index = next(self._order)
        tenant = self.tenants[index or 0]
        headers = {"x-tenant-id": tenant["tenant"]}
        if tenant.get("api_key"):
            headers["authorization"] = f"Bearer {tenant['api_key']}"
        return self.base if index is None else tenant["model"], headers, tenant["tenant"]

    def _draw(self, popularity: str) -> Iterator[int | None]:
        if popularity == "base":
            return itertools.repeat(None)
        if popularity not in (known := get_args(Popularity)):
            raise ValueError(f"--popularity must be base or one of {known}, got {popularity!r}")
        return itertools.cycle(choose_adapters(popularity, SEQUENCE, len(self.tenants)))  # type: ignore[arg-type]


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _start(environment: Any, **_: Any) -> None:
    environment.world = World(environment.parsed_options)


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def _write_requests(environment: Any, **_: Any) -> None:
    path = environment.parsed_options.requests_csv
    if path:
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Answered)])
            writer.writeheader()
            writer.writerows(asdict(answered) for answered in environment.world.answered)


class TenantUser(HttpUser):  # type: ignore[misc]  # locust is not typed for us
    """Sends its next request as soon as the last one is answered."""

    wait_time = constant(0)

    @task  # type: ignore[untyped-decorator]
    def complete(self) -> None:
        world: World = self.environment.world
        model, headers, tenant = world.next_call()
        body = {
            "model": model,
            "prompt": [random.randrange(2, world.vocab) for _ in range(world.options.prompt_tokens)],
            "max_tokens": world.options.new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
        }
        answered = Answered(tenant, time.perf_counter())
        world.answered.append(answered)
        sending = self.client.post(
            "/v1/completions", json=body, headers=headers, name="POST /v1/completions", stream=True, catch_response=True
        )
        with sending as response:
            answered.error = _read(response, answered, world.options.new_tokens)
            if answered.error:
                response.failure(answered.error)
                return
        self._report(answered)

    def _report(self, answered: Answered) -> None:
        ttft_s = answered.first_s - answered.sent_s
        tpot_s = (answered.last_s - answered.first_s) / max(1, answered.num_tokens - 1)
        for name, seconds in (("TTFT", ttft_s), ("TPOT", tpot_s)):
            self.environment.events.request.fire(
                request_type="stream",
                name=name,
                response_time=1e3 * seconds,
                response_length=answered.num_tokens,
                exception=None,
                context={},
            )


def _read(response: Any, answered: Answered, new_tokens: int) -> str:
    """Follow the stream to its end; what went wrong, or nothing.

    Without logprobs every chunk with a choice is one token, also one whose text is held back.
    """
    if response.status_code != 200:
        return f"{response.status_code}: {response.text[:200]}"
    for line in response.iter_lines():
        if line.startswith(b"data: {"):
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                return str(chunk["error"])
            if chunk["choices"]:
                answered.saw_token()
    answered.is_whole = True
    return "" if answered.num_tokens == new_tokens else f"{answered.num_tokens} tokens instead of {new_tokens}"
