"""A call's tokens, counted once: for its usage, the bill, the metrics and the quota."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from adapters_store.accounts.usage import UsageCounts
from server.api.generation.call import Call
from server.api.generation.parts.progress import CallProgress, usage_of_sequence
from server.api.target import Target
from server.api.telemetry.usage_log import UsageLog
from server.engine.request import Request, SamplingParams, TokenEvent

PROMPTS = [[1] * 5, [2] * 7]
CHOICES = 2


@dataclass
class Written:
    """What a usage log was handed to save."""

    counts: UsageCounts = field(default_factory=UsageCounts)
    labels: set[tuple[str, str]] = field(default_factory=set)

    def add(self, used: dict[object, UsageCounts]) -> None:
        for key, counts in used.items():
            self.labels.add((key.tenant, key.adapter))  # type: ignore[attr-defined]
            self.counts.add(counts)


def call() -> Call:
    requests = [
        Request(id=f"r{index}", tenant="acme", prompt_ids=PROMPTS[index // CHOICES], params=SamplingParams())
        for index in range(len(PROMPTS) * CHOICES)
    ]
    target = Target(model="law", tenant="acme", label="law@1")
    return Call(id="c", created=0, target=target, prompts=PROMPTS, num_choices=CHOICES, requests=requests)


def saw(progress: CallProgress, index: int, output: int, cached: int = 0) -> None:
    event = TokenEvent(f"r{index}", num_prompt_tokens=len(PROMPTS[index // CHOICES]), num_output_tokens=output)
    event.num_cached_tokens = cached
    progress.saw(index, event)


def test_a_prompt_counts_once_and_each_choices_tokens_all() -> None:
    progress = CallProgress(call())
    for index, output in enumerate((3, 4, 5, 6)):
        saw(progress, index, output, cached=2 if index % CHOICES else 1)
    assert progress.usage() == {
        "prompt_tokens": 12,
        "completion_tokens": 18,
        "total_tokens": 30,
        "prompt_tokens_details": {"cached_tokens": 2},  # of the first choices: the others find what those left
    }
    assert (progress.num_read_tokens, progress.num_cached_tokens, progress.num_output_tokens) == (24, 6, 18)


def test_the_event_of_a_stopping_engine_takes_nothing_back() -> None:
    progress = CallProgress(call())
    saw(progress, 0, 9, cached=3)
    progress.saw(0, TokenEvent("r0"))
    assert (progress.num_read_tokens, progress.num_cached_tokens, progress.num_output_tokens) == (5, 3, 9)


def test_however_often_it_is_billed_the_bill_is_the_usage() -> None:
    rng = random.Random(7)
    for _ in range(50):
        progress, written = CallProgress(call()), Written()
        log = UsageLog(written)  # type: ignore[arg-type]
        outputs = [0] * 4
        for _ in range(rng.randint(1, 20)):
            index = rng.randrange(4)
            outputs[index] += rng.randint(0, 3)
            saw(progress, index, outputs[index], cached=rng.choice((0, 1)))
            if rng.random() < 0.5:
                progress.bill(log)
        progress.bill(log)
        progress.bill(log)
        log.flush()
        usage = progress.usage()
        assert written.labels == {("acme", "law@1")}
        assert written.counts == UsageCounts(
            1, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], usage["completion_tokens"]
        )


def test_one_sequences_usage_is_its_own_prompts() -> None:
    shown = usage_of_sequence(call(), 3, TokenEvent("r3", num_output_tokens=2, num_cached_tokens=1))
    assert (shown["prompt_tokens"], shown["completion_tokens"], shown["total_tokens"]) == (7, 2, 9)
    assert shown["prompt_tokens_details"] == {"cached_tokens": 1}
