"""The nouns of the engine: a request, and the events that answer it. Knows nothing of tensors, threads or HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from adapters_store.base.description import AdapterDigest
from server.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to complete. `n` choices of one HTTP call are `n` requests that share their prompt's KV blocks.

    cache_salt separates the prefix cache of tenants: two requests can share KV blocks only when salt, adapter digest
    and tokens are all equal. weight: the tenant's share of the server, next to the others'. price: what one of its
    tokens costs the tenant in virtual tokens, 1 unless large ranks are charged more. deadline_s: when nobody waits for
    it any more, in seconds of the scheduler's clock.
    """

    id: str
    tenant: str
    prompt_ids: list[int]
    params: SamplingParams
    adapter: AdapterDigest | None = None
    adapter_name: str | None = None  # for metrics and messages only, never an identity
    arrival_s: float = 0.0
    weight: float = 1.0
    price: float = 1.0
    deadline_s: float | None = None

    status: Status = Status.WAITING
    output_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0  # tokens whose keys and values are in the cache
    num_cached_tokens: int = 0  # of those, how many the prefix cache gave us at first admission
    num_verified_tokens: int = 0  # of those, how many a finite sample has confirmed since
    num_written_tokens: int = 0  # tokens whose keys and values a forward may have written, confirmed or not
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(
        default_factory=list
    )  # chain hash of each full block of tokens, as far as asked for
    slot: int | None = None  # row of the device adapter table while a reference is held
    num_preemptions: int = 0  # how often its keys were given up, to be computed again
    rope_set: int = 0  # which of the base's rotary factors its blocks' keys were made with
    first_scheduled_s: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def cache_salt(self) -> str:
        return self.tenant

    def token_at(self, position: int) -> int:
        prompt_length = len(self.prompt_ids)
        return self.prompt_ids[position] if position < prompt_length else self.output_ids[position - prompt_length]

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions start..stop-1 of prompt + output."""
        prompt_length = len(self.prompt_ids)
        if stop <= prompt_length:
            return self.prompt_ids[start:stop]
        if start >= prompt_length:
            return self.output_ids[start - prompt_length : stop - prompt_length]
        return self.prompt_ids[start:] + self.output_ids[: stop - prompt_length]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token, and of the most likely alternatives at that position (best first)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestError:
    """Why a request failed: `code` is the API's error code, `message` names field, value and limit.

    retry_after_s: when the same request may succeed; None where it would fail again.
    """

    code: str
    message: str
    status: int = 500
    retry_after_s: float | None = None


@dataclass(slots=True)
class TokenEvent:
    """What one step did for one request. Exactly one event per request has `finish_reason` set, and it is the last.

    text: newly released text, after UTF-8 and stop-string hold-back. logprobs: one entry per id in token_ids.
    prompt_logprobs: on the first event, one entry per prompt token; the first token's is None.
    stop_reason: the stop string or stop token id that ended it, None for end-of-sequence.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: RequestError | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
