"""The nouns of scheduling: one forward and its limits. No decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from server.engine.request import Request, Status
from server.settings import check_settings, setting


class StepSize(NamedTuple):
    """The largest step: tokens of one forward, requests in one batch, tokens that prompt lookup adds."""

    tokens: int
    rows: int
    drafts: int = 0


CPU_STEP = StepSize(512, 64, 7)


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """Limits and fairness of scheduling; each field's help says what it does."""

    max_batch_tokens: int | None = setting(
        None,
        "Maximum tokens of one forward, at least --max-running; longer prompts run in chunks (default: 512; on a GPU "
        "2048, from 64 GiB of its memory on 8192).",
        at_least=1,
    )
    max_running: int | None = setting(
        None, "Maximum requests in one batch (default: 64; on a GPU of 64 GiB or more 256).", at_least=1
    )
    prefill_chunk: int | None = setting(
        None, "Maximum prompt tokens of one request in one forward (default: all that fit).", at_least=1, unit="tokens"
    )
    max_waiting: int = setting(4096, "Maximum queued requests; further ones get 429.", at_least=1)
    max_waiting_per_tenant: int = setting(1024, "Maximum queued requests of one tenant.", at_least=1)
    watermark: float = setting(
        0.01,
        "Share of KV blocks kept free when requests are admitted, so that running requests can grow.",
        at_least=0,
        below=1,
        name="kv_watermark",
    )
    reserved: float = setting(
        1 / 16,
        "Share of --max-running kept from a tenant that already uses its share and would then run most.",
        at_least=0,
        below=1,
        name="reserved_running",
    )
    starvation_s: float = setting(
        2.0,
        "After this long without room for its adapter, a request holds back later ones that need one.",
        at_least=0,
        at_most=86_400,
    )
    prompt_lookup: int | None = setting(
        None,
        "Maximum tokens that prompt lookup adds to a forward of few requests: guesses of what they say next, from "
        "what they and their tenant's earlier answers said; 0: none (default: 7; on a GPU 0).",
        at_least=0,
        at_most=63,
        unit="tokens",
    )
    lookahead: int = setting(
        32, "Maximum queued adapters that are loaded ahead of time.", at_least=1, name="adapter_lookahead"
    )
    retry_after_s: float = setting(
        1.0, "Retry-After of a request refused because the queue is full.", at_least=0, at_most=86_400
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.max_batch_tokens is not None and self.max_batch_tokens < (self.max_running or 0):
            raise ValueError(
                f"max_batch_tokens must be >= max_running ({self.max_running}), got {self.max_batch_tokens}"
            )

    @property
    def tokens_per_step(self) -> int:
        """max_batch_tokens, or what suits a CPU."""
        return self.max_batch_tokens or max(CPU_STEP.tokens, self.max_running or 0)

    @property
    def running_slots(self) -> int:
        """max_running, or what suits a CPU."""
        return self.max_running or min(CPU_STEP.rows, self.tokens_per_step)

    @property
    def draft_tokens(self) -> int:
        """prompt_lookup, or none."""
        return self.prompt_lookup or 0

    def with_defaults(self, step: StepSize) -> SchedulerSettings:
        """The same, with the step's numbers for those not given; a given one bounds the other."""
        tokens = self.max_batch_tokens or max(step.tokens, self.max_running or 0)
        drafts = step.drafts if self.prompt_lookup is None else self.prompt_lookup
        return replace(
            self,
            max_batch_tokens=tokens,
            max_running=self.max_running or min(step.rows, tokens),
            prompt_lookup=drafts,
        )


@dataclass(slots=True)
class ScheduledRow:
    """Tokens start..start+num_tokens-1 of one request. `samples` holds between schedule() and commit().

    draft: guesses of the tokens behind the request's last one, which the row computes too; num_tokens counts them.
    """

    request: Request
    start: int
    num_tokens: int
    draft: Sequence[int] = ()

    @property
    def samples(self) -> bool:
        """Whether the row reaches the request's last token, so that its logits choose the next one."""
        end = self.start + self.num_tokens
        return end == self.request.num_tokens or (bool(self.draft) and end - len(self.draft) == self.request.num_tokens)

    @property
    def is_current(self) -> bool:
        """Whether the row continues its request. A row scheduled before the last tokens were known does not, if these
        ended the request or it got none."""
        return self.request.status is Status.RUNNING and self.start == self.request.num_computed_tokens


@dataclass(slots=True)
class Schedule:
    """One forward: `num_decodes` rows of one token each, then prefill chunks or rows with a draft. Every request at
    most once."""

    rows: list[ScheduledRow]
    num_tokens: int
    num_decodes: int

    def add(self, request: Request, count: int) -> None:
        """Add `count` more of the request's tokens."""
        self.num_tokens += count
        row = self._chunk_of(request)
        if row is None:
            self.rows.append(ScheduledRow(request, request.num_computed_tokens, count))
        else:
            row.num_tokens += count

    def drop(self, request: Request) -> None:
        """Remove the request's row, if it has one."""
        for index, row in enumerate(self.rows):
            if row.request is request:
                self.num_tokens -= row.num_tokens
                self.num_decodes -= index < self.num_decodes
                del self.rows[index]
                return

    def keep_current(self) -> None:
        """Remove requests that the forward before this one ended or gave no token. This one must only decode."""
        assert self.num_decodes == len(self.rows), "a forward with prompts needs all earlier tokens"
        self.rows = [row for row in self.rows if row.is_current]
        self.num_tokens = self.num_decodes = len(self.rows)

    def num_chunk_tokens(self, request: Request) -> int:
        """How many tokens of its prompt this forward computes."""
        row = self._chunk_of(request)
        return 0 if row is None else row.num_tokens

    def _chunk_of(self, request: Request) -> ScheduledRow | None:
        return next((row for row in self.rows[self.num_decodes :] if row.request is request), None)
