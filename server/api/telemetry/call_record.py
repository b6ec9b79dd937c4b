"""What is known of one HTTP call for text once it is over: the noun that log and traces read. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class CallRecord:
    """call_id: the answer's id. model: as the client wrote it. adapter: the label in metrics, "base" without one.

    Times are seconds of time.perf_counter(); None if it did not come so far. first_*: of the first sequence.
    """

    call_id: str
    tenant: str
    model: str
    adapter: str
    num_sequences: int
    start_s: float
    end_s: float = 0.0
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    error_code: str | None = None
