"""What is asked of each server: many clients at once, and single prompts. Knows the client; knows no server."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from benchmarks.common.timing import percentile
from benchmarks.common.workload import random_prompts
from benchmarks.peers.client import Answer, Ask, complete

MakeAsk = Callable[[list[int], int, int | None], Ask]  # prompt, new tokens, number of the adapter (None: the base)


@dataclass(frozen=True, slots=True)
class Load:
    """`requests` by `clients` that each send the next when theirs is answered; the n-th uses adapter n % adapters.
    new 1: a load that measures the prompt alone. schema: what all answers must fit."""

    name: str
    clients: int
    adapters: int
    prompt: int
    new: int
    requests: int
    schema: Mapping[str, object] | None = None

    @property
    def is_prompt(self) -> bool:
        return self.new == 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """tokens_per_s: generated, prompts' time included. Milliseconds: medians of requests; token_p95_ms over them."""

    tokens_per_s: float
    ttft_ms: float
    token_ms: float
    token_p95_ms: float


STRINGS = {"type": "array", "items": {"type": "string"}, "minItems": 10_000}  # no answer ends by itself
FULL_LOADS = (
    Load("base, 8 clients", 8, 0, 64, 48, 16),
    Load("base, 32 clients", 32, 0, 64, 48, 32),
    Load("one adapter, 8 clients", 8, 1, 64, 48, 16),
    Load("8 adapters, 8 clients", 8, 8, 64, 48, 16),
    Load("32 adapters, 32 clients", 32, 32, 64, 48, 32),
    Load("a JSON schema, 8 clients", 8, 0, 64, 48, 16, STRINGS),
    Load("a JSON schema, 32 clients", 32, 0, 64, 48, 32, STRINGS),
    Load("base, prompt of 16", 1, 0, 16, 1, 8),
    Load("base, prompt of 128", 1, 0, 128, 1, 6),
    Load("base, prompt of 512", 1, 0, 512, 1, 3),
    Load("base, prompt of 2048", 1, 0, 2048, 1, 1),
    Load("an adapter, prompt of 512", 1, 1, 512, 1, 2),
)
QUICK_LOADS = (
    Load("base, 2 clients", 2, 0, 8, 4, 4),
    Load("2 adapters, 2 clients", 2, 2, 8, 4, 4),
    Load("base, prompt of 16", 1, 0, 16, 1, 2),
)
TRIAL_LOADS = (FULL_LOADS[0], FULL_LOADS[7])


def run_load(load: Load, make_ask: MakeAsk, vocab: int, *, seed: int) -> Outcome:
    """The same seed gives the same prompts to every server."""
    prompts = random_prompts(load.requests, load.prompt, vocab, seed=seed)
    asks = [
        make_ask(prompt, load.new, index % load.adapters if load.adapters else None)
        for index, prompt in enumerate(prompts)
    ]
    if load.schema is not None:
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": load.schema}}
        asks = [replace(ask, fields=ask.fields | {"response_format": form}) for ask in asks]
    began_s = time.perf_counter()
    with ThreadPoolExecutor(load.clients) as clients:
        answers = list(clients.map(complete, asks))
    return _outcome(answers, time.perf_counter() - began_s)


def _outcome(answers: list[Answer], seconds: float) -> Outcome:
    token_ms = [1e3 * answer.token_s for answer in answers]
    return Outcome(
        tokens_per_s=sum(answer.num_tokens for answer in answers) / seconds,
        ttft_ms=1e3 * statistics.median(answer.ttft_s for answer in answers),
        token_ms=statistics.median(token_ms),
        token_p95_ms=percentile(token_ms, 95),
    )


def warm_up(make_ask: MakeAsk, vocab: int, *, adapters: int) -> None:
    """Every adapter once, and the base at several lengths: servers load and compile at the first use."""
    lengths = itertools.cycle((8, 64))
    for adapter in (None, None, *range(adapters)):
        prompt = random_prompts(1, next(lengths), vocab, seed=10**6 + (adapter or 0))[0]
        complete(make_ask(prompt, 2, adapter))


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """`count` other programs that each use a core, in the block."""
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield
