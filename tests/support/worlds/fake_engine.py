"""An engine without a model, for tests of what lies above the engine: a thread, real tokens, real stop rules.

Greedy, it names its adapter and repeats the prompt; every answer is a function of adapter, prompt, seed and position.
What a real engine does by chance (fail, fill up, stall) it does on command.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from adapters_store.base.description import AdapterDigest, BaseDescription
from adapters_store.packed.layout import PackedAdapter
from adapters_store.tiers.entries import Owner, Residency
from server.engine.metrics import EngineStats
from server.engine.request import QueueFull, Request, RequestError, TokenEvent, TokenLogprob
from server.engine.text.output import OutputState
from server.engine.text.tokenizer import Tokenizer

Listener = Callable[[TokenEvent], None]


@dataclass
class _Sequence:
    request: Request
    listener: Listener
    output: OutputState
    script: list[int]
    num_cached_tokens: int
    failure: tuple[int, RequestError] | None = None
    num_tokens: int = 0
    is_aborted: bool = False


class FakeEngine:
    """step_s: the least time between two steps. max_waiting: how many sequences at once before QueueFull."""

    def __init__(
        self,
        base: BaseDescription,
        tokenizer: Tokenizer,
        *,
        max_model_len: int = 512,
        step_s: float = 0.0,
        max_waiting: int = 256,
    ) -> None:
        self.base = base
        self.served_name = "tiny"
        self.max_model_len = max_model_len
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.vocabulary(tokenizer.vocab_size)
        self.max_waiting = max_waiting
        self.step_s = step_s
        self.ready = True
        self.num_steps = 0
        self.aborted: list[str] = []
        self.seen: list[Request] = []
        self.forgotten: list[AdapterDigest] = []
        self.warmed: list[tuple[AdapterDigest, str, Owner]] = []
        self.pinned: set[AdapterDigest] = set()
        self.num_retries = 0
        self.measured: list[tuple[PackedAdapter, PackedAdapter]] = []
        self.nats = 0.0  # of every int8 adapter
        self.may_step = threading.Event()
        self.may_step.set()
        self.stalls_at: int | None = None  # after that many steps it waits until `resume`
        self._scripts: list[list[int]] = []
        self._failures: list[tuple[int, RequestError]] = []
        self._cached_prompts: set[tuple[str, str | None, tuple[int, ...]]] = set()
        self._sequences: dict[str, _Sequence] = {}
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="fake-engine")

    def __enter__(self) -> FakeEngine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self.resume()
        self._thread.join()

    def resume(self) -> None:
        """Go on, also past a step at which it was to stall and that it has not reached yet."""
        with self._changed:
            self.stalls_at = None
            self.may_step.set()

    def fail_next(self, error: RequestError, *, after_tokens: int = 0) -> None:
        """The next sequence submitted fails once it has given `after_tokens` tokens."""
        self._failures.append((after_tokens, error))

    def say_next(self, token_ids: list[int]) -> None:
        """The next sequence submitted says these tokens, again and again."""
        self._scripts.append(token_ids)

    def submit(self, request: Request, listener: Listener) -> None:
        with self._changed:
            if len(self._sequences) >= self.max_waiting:
                raise QueueFull(f"{self.max_waiting} requests wait, which is the limit", retry_after_s=1.5)
            self.seen.append(request)
            self._sequences[request.id] = self._sequence(request, listener)
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._sequences:
                self.aborted.append(request_id)
                self._sequences[request_id].is_aborted = True

    def forget_adapters(self, digests: Sequence[AdapterDigest]) -> None:
        self.forgotten += digests

    def retry_adapters(self) -> None:
        self.num_retries += 1

    def int8_change(self, plain: PackedAdapter, small: PackedAdapter) -> Future[float]:
        answer: Future[float] = Future()
        self.measured.append((plain, small))
        answer.set_result(self.nats)
        return answer

    def warm_adapter(self, digest: AdapterDigest, name: str, owner: Owner) -> Future[Residency]:
        self.warmed.append((digest, name, owner))
        return self._residency(digest)

    def pin_adapter(self, digest: AdapterDigest) -> Future[Residency]:
        self.pinned.add(digest)
        return self._residency(digest)

    def unpin_adapter(self, digest: AdapterDigest) -> Future[Residency]:
        self.pinned.discard(digest)
        return self._residency(digest)

    def _residency(self, digest: AdapterDigest) -> Future[Residency]:
        answer: Future[Residency] = Future()
        answer.set_result(Residency("device", digest in self.pinned))
        return answer

    def is_healthy(self) -> bool:
        return self._thread.is_alive()

    def is_ready(self) -> bool:
        return self.ready

    def stats(self) -> EngineStats:
        with self._changed:
            names = {s.request.adapter_name for s in self._sequences.values() if s.request.adapter_name}
            digests = {s.request.adapter: None for s in self._sequences.values() if s.request.adapter is not None}
            return EngineStats(
                num_running=len(self._sequences),
                num_kv_blocks=64,
                kv_block_size=16,
                running_adapters=tuple(sorted(names)),
                resident_adapters=tuple(digests),
                counters={"engine_steps": float(self.num_steps)},
            )

    def _sequence(self, request: Request, listener: Listener) -> _Sequence:
        key = (request.tenant, request.adapter, tuple(request.prompt_ids))
        num_cached = len(request.prompt_ids) - 1 if key in self._cached_prompts else 0
        self._cached_prompts.add(key)
        output = OutputState(request.params, self.tokenizer.token_texts, self.tokenizer.eos_ids, request.prompt_ids)
        failure = self._failures.pop(0) if self._failures else None
        return _Sequence(request, listener, output, self._script(request), num_cached, failure)

    def _script(self, request: Request) -> list[int]:
        if self._scripts:
            return self._scripts.pop(0)
        who = request.adapter_name or "base"
        prompt = self.tokenizer.decode(request.prompt_ids)
        return [*self.tokenizer.encode(f" {who} heard: {prompt}"), max(self.tokenizer.eos_ids)]

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._sequences or self._is_stopping)
                if self._is_stopping:
                    return
                batch = list(self._sequences.values())
            self.may_step.wait()
            time.sleep(self.step_s)
            for sequence in batch:
                self._step(sequence)
            self.num_steps += 1
            with self._changed:
                if self.num_steps == self.stalls_at:
                    self.may_step.clear()

    def _step(self, sequence: _Sequence) -> None:
        event = self._event(sequence)
        if event.finish_reason is not None:
            with self._changed:
                del self._sequences[sequence.request.id]
        sequence.listener(event)

    def _event(self, sequence: _Sequence) -> TokenEvent:
        request, params = sequence.request, sequence.request.params
        event = TokenEvent(
            request.id,
            num_prompt_tokens=len(request.prompt_ids),
            num_output_tokens=sequence.num_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
        )
        if params.prompt_logprobs is not None and sequence.num_tokens == 0:
            event.prompt_logprobs = self._prompt_logprobs(request)
        if sequence.is_aborted:
            event.finish_reason = "abort"
        elif sequence.failure is not None and sequence.failure[0] <= sequence.num_tokens:
            event.finish_reason, event.error = "error", sequence.failure[1]
        elif params.max_tokens == 0:
            event.finish_reason = "length"
        else:
            self._add_token(sequence, event)
        return event

    def _add_token(self, sequence: _Sequence, event: TokenEvent) -> None:
        params = sequence.request.params
        token_id = self._choose(sequence)
        sequence.num_tokens += 1
        delta = sequence.output.append(token_id)
        event.token_ids, event.text, event.marks = [token_id], delta.text, delta.marks
        event.finish_reason, event.stop_reason = delta.finish_reason, delta.stop_reason
        event.num_output_tokens, event.num_reasoning_tokens = sequence.num_tokens, sequence.output.num_reasoning_tokens
        if params.logprobs is not None:
            event.logprobs = [self._logprob(token_id, params.logprobs)]

    def _choose(self, sequence: _Sequence) -> int:
        request, position = sequence.request, sequence.num_tokens
        wanted = sequence.script[position % len(sequence.script)]
        bias = dict(request.params.logit_bias)
        if bias and max(bias.values()) >= 100:
            return max(bias, key=bias.__getitem__)
        if bias.get(wanted, 0.0) <= -100:
            return self._alternatives(wanted)[0]
        if request.params.is_greedy:
            return wanted
        seed = request.params.seed if request.params.seed is not None else request.id
        return random.Random(f"{seed}/{position}").choice([wanted, *self._alternatives(wanted)])

    def _alternatives(self, token_id: int) -> list[int]:
        """Visible ASCII tokens, so that text stays readable."""
        start = hashlib.sha256(str(token_id).encode()).digest()[0]
        letters = self.tokenizer.encode("abcdefghijklmnopqrstuvwxyz"[start % 20 :], add_special_tokens=False)
        return [letter for letter in letters if letter != token_id][:3]

    def _logprob(self, token_id: int, count: int) -> TokenLogprob:
        ranked = [token_id, *(other for other in range(10, 40) if other != token_id)][:count]
        return TokenLogprob(token_id, -0.25, tuple((other, -0.25 - rank) for rank, other in enumerate(ranked)))

    def _prompt_logprobs(self, request: Request) -> list[TokenLogprob | None]:
        count = request.params.prompt_logprobs or 0
        return [None, *(self._logprob(token_id, count) for token_id in request.prompt_ids[1:])]
