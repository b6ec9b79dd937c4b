"""How one request wants its tokens chosen. Checked once, never written again."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters_store.parsing.numbers import is_within
from adapters_store.parsing.strict_json import shown

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_LOGIT_BIAS = 1024
SMALLEST_FLOAT32 = 2.0**-126  # below, its numbers lose digits, and then are 0


class InvalidRequest(ValueError):
    """Bad input from a user: the field, the value and the limit. HTTP 400 unless `code` says otherwise."""

    def __init__(self, param: str, message: str, *, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.message = message
        self.code = code


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """OpenAI's sampling fields and the usual ones beyond.

    temperature 0 and top_p 0 mean greedy. top_k 0 means off. logprobs: how many alternatives to report beside the
    chosen token (None: no logprobs at all, 0: the chosen token only). prompt_logprobs: the same for prompt positions.
    end_ids: tokens that end this sequence as the base's own end-of-sequence tokens do.
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
    ignore_eos: bool = False
    include_stop_in_output: bool = field(default=False)

    def __post_init__(self) -> None:
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
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_p == 0.0


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
