"""The nouns of the engine: a request, its sampling parameters and constraint, the errors that refuse it, the events
that answer it. Knows nothing of tensors, grammars, threads or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Literal, Protocol

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import InputRefused, LimitReached
from adapters_store.parsing.numbers import is_within
from adapters_store.parsing.strict_json import shown

if TYPE_CHECKING:  # commands that only print help read this module
    import numpy as np
    from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "abort", "error"]
Pooling = Literal["last", "mean"]
Mark = tuple[int, int]  # a marker's token: characters of the text before it, and its id
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_LOGIT_BIAS = 1024
SMALLEST_FLOAT32 = 2.0**-126  # below, its numbers lose digits, and then are 0


class InvalidRequest(InputRefused):
    """One field of a request is not usable."""

    def __init__(self, param: str, message: str, *, code: str = "invalid_value") -> None:
        super().__init__(code, message, param=param)


def check_unicode(param: str, text: str) -> bytes:
    """The text in UTF-8. Raises InvalidRequest for a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        reason = f"{param} is not valid Unicode: a lone surrogate at character {error.start}"
        raise InvalidRequest(param, reason) from error


class QueueFull(LimitReached):
    """The waiting queue is at its limit."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__("queue_full", message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ReasoningIds:
    """The tokens that open and close an answer's reasoning. open None: the prompt has opened it."""

    open: int | None
    close: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """OpenAI's sampling fields and the usual ones beyond.

    temperature 0 and top_p 0 mean greedy. top_k 0 means off. logprobs: how many alternatives to report beside the
    chosen token (None: no logprobs at all, 0: the chosen token only). prompt_logprobs: the same for prompt positions.
    end_ids: tokens that end this sequence as the base's own end-of-sequence tokens do. mark_ids: tokens whose places in
    the text the events report. reasoning: whose tokens are counted; None: none are. pooling: of the prompt's hidden
    states, one vector is made; max_tokens must be 0.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    mark_ids: frozenset[int] = frozenset()
    reasoning: ReasoningIds | None = None
    ignore_eos: bool = False
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        assert self.pooling is None or self.max_tokens == 0, "a pooled prompt has no answer"
        _check_range("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_float("temperature", self.temperature, 0.0, 2.0)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("logprobs", self.logprobs or 0, 0, MAX_LOGPROBS)
        _check_range("prompt_logprobs", self.prompt_logprobs or 0, 0, MAX_LOGPROBS)
        _check_count("stop", len(self.stop), MAX_STOP_STRINGS)
        _check_count("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        self._check_members()

    def _check_members(self) -> None:
        for text in self.stop:
            if not text or len(text.encode(errors="surrogatepass")) > MAX_STOP_BYTES:
                raise InvalidRequest("stop", f"each stop string must have 1 to {MAX_STOP_BYTES} bytes")
        for _, bias in self.logit_bias:
            _check_float("logit_bias", bias, -100.0, 100.0)

    @property
    def needs_all_positions(self) -> bool:
        """Whether every position of the prompt must be computed: cached keys and values do not give what it asks."""
        return self.prompt_logprobs is not None or self.pooling == "mean"

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens said before change what is drawn."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_p == 0.0


@dataclass(frozen=True, slots=True)
class RequestError:
    """Why a request failed: `code` is the API's error code, `message` names field, value and limit.

    retry_after_s: when the same request may succeed; None if it would fail again.
    """

    code: str
    message: str
    status: int = 500
    retry_after_s: float | None = None


class TokenConstraint(Protocol):
    """Says which token may follow the output so far. One per request; after submission only the engine's thread uses
    it. No method raises for what a client or a model did: see `failure`."""

    def advance(self, output_ids: Sequence[int]) -> None:
        """Read the request's output so far. What was read before is not read again."""

    def allowed(self) -> NDArray[np.uint8]:
        """One bit for each token id, the lowest id in the lowest bit: 1 if it may be next. At least V bits, rounded up
        to whole bytes. All bits are set after a failure. The array is valid until the next call."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow: the output read so far is whole."""

    @property
    def failure(self) -> RequestError | None:
        """Set once it cannot continue; then it stays. It does not quote what the client sent."""


MaskSource = Callable[[Sequence[TokenConstraint]], "NDArray[np.uint8]"]
"""`allowed` of several constraints at once, [C, bytes]. Called on one thread at a time, which may be any."""


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to complete. `n` choices of one HTTP call are `n` requests that share their prompt's KV blocks.

    tenant: in whose queue it waits, and which account it is charged to. owner: the tenant that sent it; only the lines
    of its batches wait in a queue of their own.

    cache_salt separates the prefix cache of tenants: two requests can share KV blocks only when salt, adapter digest
    and tokens are all equal. weight: the tenant's share of the server, next to the others'. price: what one of its
    tokens costs the tenant in virtual tokens, 1 unless large ranks are charged more. deadline_s: the moment after
    which no client waits for it, in seconds of the scheduler's clock. active_from: the position of the first prompt
    token that the adapter changes; before it the base runs alone.
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
    active_from: int = 0
    constraint: TokenConstraint | None = None  # what its tokens must follow, with its state so far

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
    owner: str = field(init=False)

    def __post_init__(self) -> None:
        self.owner = self.tenant

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def cache_salt(self) -> str:
        return self.owner

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


@dataclass(slots=True)
class TokenEvent:
    """What one step did for one request. Exactly one event per request has `finish_reason` set, and it is the last.

    text: newly released text, after UTF-8 and stop-string hold-back. marks: places of the tokens of
    `SamplingParams.mark_ids` in this text. logprobs: one entry per id in token_ids.
    prompt_logprobs: on the first event, one entry per prompt token; the first token's is None.
    embedding: on the last event of a pooled prompt, float32 [hidden size].
    stop_reason: the stop string or stop token id that ended it, None for end-of-sequence.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    marks: tuple[Mark, ...] = ()
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    embedding: NDArray[np.float32] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: RequestError | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_reasoning_tokens: int = 0  # of the output's
    num_cached_tokens: int = 0


def _check_float(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Within the range, and a number that the sampler's float32 can hold: others turn to 0 there."""
    _check_range(name, value, low, high, open_low=open_low)
    if 0.0 < abs(value) < SMALLEST_FLOAT32:
        message = f"{name} must be 0 or at least {SMALLEST_FLOAT32:.3g} in size, as float32 holds it, got {value}"
        raise InvalidRequest(name, message)


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if not is_within(value, low, high, open_low=open_low):
        bracket = "(" if open_low else "["
        raise InvalidRequest(name, f"{name} must be in {bracket}{low}, {high}], got {shown(value)}")


def _check_count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(name, f"{name} takes at most {limit} entries, got {count}")
