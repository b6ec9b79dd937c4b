"""The demo's showcase: tenants publish their adapters, and all of them answer one prompt in one batch.

Decides what is asked and measured; knows neither the source of base, adapters and prompts, nor the display.
"""

from __future__ import annotations

import queue
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

from adapters_store.accounts.records import TenantKey
from adapters_store.base.description import AdapterDigest, BaseDescription
from adapters_store.errors import NotFound
from adapters_store.parsing.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.store import AdapterStore
from server.engine.request import Request, SamplingParams, TokenEvent
from server.engine.startup.build import EngineParts

ADAPTER_NAME = "style"  # the same for every tenant: only the key tells them apart
AGENT_NAME = "agent"
BASE = "base"
_POLL_S = 0.1

VoiceEvent = tuple[str, int, TokenEvent]  # voice, step of the engine, event


class ShowcaseFailed(RuntimeError):
    """An answer did not finish; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Voice:
    """What answers: the bare base, or a tenant's adapter. api_key is the tenant's; the base has none of its own."""

    name: str
    adapter: AdapterDigest | None = None
    api_key: str | None = field(default=None, repr=False)


@dataclass(slots=True)
class Answer:
    """One voice's answer so far."""

    text: str = ""
    num_tokens: int = 0
    is_finished: bool = False


@dataclass(slots=True)
class Round:
    """One prompt and all answers. rows_per_step: how many of these requests each engine step moved on."""

    prompt: str
    answers: dict[str, Answer]
    rows_per_step: list[int] = field(default_factory=list)
    duration_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers.values())


@dataclass(frozen=True, slots=True)
class Summary:
    """All rounds together. max_rows: the most requests that one step moved on; shared_steps: steps with two or more."""

    num_tokens: int
    duration_s: float
    num_steps: int
    shared_steps: int
    max_rows: int

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.duration_s if self.duration_s else 0.0


def summary_of(rounds: Sequence[Round]) -> Summary:
    rows = [count for each in rounds for count in each.rows_per_step]
    return Summary(
        num_tokens=sum(each.num_tokens for each in rounds),
        duration_s=sum(each.duration_s for each in rounds),
        num_steps=len(rows),
        shared_steps=sum(count > 1 for count in rows),
        max_rows=max(rows, default=0),
    )


def introduce(store: AdapterStore, base: BaseDescription, adapters: Mapping[str, Path]) -> list[Voice]:
    """The base, and every tenant (made, or given a new key) with its adapter published as ADAPTER_NAME."""
    return [Voice(BASE), *published(store, base, adapters, ADAPTER_NAME)]


def published(store: AdapterStore, base: BaseDescription, adapters: Mapping[str, Path], name: str) -> list[Voice]:
    """Every tenant (made, or given a new key) with its adapter published under this name."""
    voices = []
    for tenant, folder in adapters.items():
        key = key_of(store, tenant)
        version = store.publish(
            tenant=tenant,
            name=name,
            config=(folder / CONFIG_FILE).read_bytes(),
            weights=folder / WEIGHTS_FILE,
            base=base,
        )
        voices.append(Voice(tenant, version.digest, key.api_key))
    return voices


def key_of(store: AdapterStore, tenant: str) -> TenantKey:
    """An existing data directory has the tenants, but their keys cannot be read."""
    try:
        return store.tenants.rotate_key(tenant)
    except NotFound:
        return store.tenants.create(tenant)


class Showcase:
    """Sends one prompt to every voice at once."""

    def __init__(self, parts: EngineParts, voices: Sequence[Voice], *, max_tokens: int = 96) -> None:
        self._parts = parts
        self._voices = voices
        self._params = SamplingParams(max_tokens=max_tokens, temperature=0.0)

    def ask(self, prompt: str) -> Iterator[Round]:
        """Yields the round as it grows, a few times a second; the last one is complete. Raises ShowcaseFailed.

        Raises InvalidRequest, too, for a prompt that does not fit the model.
        """
        events: queue.SimpleQueue[VoiceEvent] = queue.SimpleQueue()
        asked = {voice.name: self._request(voice, prompt) for voice in self._voices}
        this = Round(prompt, {name: Answer() for name in asked})
        rows: defaultdict[int, set[str]] = defaultdict(set)
        start_s = time.perf_counter()
        try:
            for name, request in asked.items():
                self._parts.worker.submit(request, self._listener(name, events))
            while not all(answer.is_finished for answer in this.answers.values()):
                _apply(events, this, rows)
                this.duration_s = time.perf_counter() - start_s
                this.rows_per_step = [len(rows[step]) for step in sorted(rows)]
                yield this
        finally:
            for request in asked.values():
                self._parts.worker.abort(request.id)

    def _request(self, voice: Voice, prompt: str) -> Request:
        tokenizer = self._parts.worker.tokenizer
        chat = tokenizer.has_chat_template
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
        return Request(
            id=f"demo-{voice.name}-{uuid4().hex[:8]}",
            tenant=voice.name,
            prompt_ids=ids,
            params=replace(self._params, end_ids=tuple(tokenizer.chat_end_ids)) if chat else self._params,
            adapter=voice.adapter,
            adapter_name=None if voice.adapter is None else f"{voice.name}/{ADAPTER_NAME}",
        )

    def _listener(self, name: str, events: queue.SimpleQueue[VoiceEvent]) -> Callable[[TokenEvent], None]:
        """Called on the engine's thread, where the count of steps is the step that the event belongs to."""
        engine = self._parts.engine
        return lambda event: events.put((name, int(engine.stats().counters["steps"]), event))


def _apply(events: queue.SimpleQueue[VoiceEvent], this: Round, rows: defaultdict[int, set[str]]) -> None:
    """rows: who got something from each step; one that drafts may get several tokens."""
    for name, step, event in _pending(events):
        if event.error is not None or event.finish_reason == "abort":
            reason = event.error.message if event.error else "the engine stopped"
            raise ShowcaseFailed(f"{name} could not answer {this.prompt!r}: {reason}")
        answer = this.answers[name]
        answer.text += event.text
        answer.num_tokens += len(event.token_ids)
        answer.is_finished = event.finish_reason is not None
        rows[step].add(name)


def _pending(events: queue.SimpleQueue[VoiceEvent]) -> Iterator[VoiceEvent]:
    """At least one thing if it comes soon, and whatever else is there."""
    try:
        yield events.get(timeout=_POLL_S)
        while not events.empty():
            yield events.get()
    except queue.Empty:
        return
