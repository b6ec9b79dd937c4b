"""Answers of POST /v1/messages, whole and as Anthropic's events. Knows parts of an answer; knows no request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from server.api.generation.call import Call
from server.api.generation.parts.answer_parts import Part, PartedAnswer, PartEvent
from server.api.generation.parts.progress import CallProgress
from server.api.generation.whole import Choice
from server.api.wire.errors import ApiError
from server.api.wire.json_text import json_text
from server.engine.request import TokenEvent

_STOP_REASONS = {"tool_calls": "tool_use", "length": "max_tokens"}
# Fields that Anthropic's description requires: clients made from it read no message without them.
_NO_STOP = {"stop_details": None, "container": None}
_NO_USAGE = {"cache_creation": None, "inference_geo": None, "server_tool_use": None}


def _stop(finish_reason: str | None, stop_reason: str | int | None) -> dict[str, Any]:
    """Why it ended. stop_reason: the stop sequence that ended it, if one did."""
    if finish_reason == "stop" and isinstance(stop_reason, str):
        return {**_NO_STOP, "stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    reason = None if finish_reason is None else _STOP_REASONS.get(finish_reason, "end_turn")
    return {**_NO_STOP, "stop_reason": reason, "stop_sequence": None}


def _message(call: Call, content: list[dict[str, Any]], stop: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
    head = {"id": call.id, "type": "message", "role": "assistant", "model": call.target.model}
    return {**head, "content": content, **stop, "usage": usage}


def _usage(progress: CallProgress) -> dict[str, Any]:
    """Cached tokens are counted apart from the others, as Anthropic counts them."""
    usage = progress.usage()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    details = usage.get("completion_tokens_details")
    return {
        **_NO_USAGE,
        "service_tier": "standard",
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": None if details is None else {"thinking_tokens": details["reasoning_tokens"]},
    }


def _block(part: Part, *, is_begun: bool = False) -> dict[str, Any]:
    """A content block, empty where it begins."""
    text = "" if is_begun else part.text
    if part.kind == "call":
        named = {"id": part.call_id, "name": part.name, "caller": {"type": "direct"}}
        return {"type": "tool_use", **named, "input": _arguments(text)}
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text, "citations": None}


def _arguments(text: str) -> dict[str, Any]:
    """Of a call that max_tokens cut, none: no JSON can be read."""
    try:
        value: dict[str, Any] = json.loads(text)
    except ValueError:
        return {}
    return value


def whole_text(call: Call, choices: Sequence[Choice], progress: CallProgress) -> str:
    """The answer in one piece."""
    answer, choice = PartedAnswer(call.form), choices[0]
    answer.feed(choice.text, choice.marks)
    answer.finish()
    stop = _stop(answer.finish_reason(choice.finish_reason), choice.stop_reason)
    return json_text(_message(call, [_block(part) for part in answer.parts], stop, _usage(progress)))


class MessageEvents:
    """An `EventWriter` of Anthropic's events."""

    def __init__(self, call: Call, progress: CallProgress) -> None:
        self._call = call
        self._progress = progress
        self._answer = PartedAnswer(call.form)
        self._is_begun = False
        self._end = _stop(None, None)

    def chunks(self, index: int, event: TokenEvent) -> str:
        events: list[Mapping[str, Any]] = []
        if not self._is_begun:
            self._is_begun = True
            message = _message(self._call, [], _stop(None, None), _usage(self._progress))
            events.append({"type": "message_start", "message": message})
        parts = self._answer.feed(event.text, event.marks)
        if event.finish_reason is not None:
            parts += self._answer.finish()
            self._end = _stop(self._answer.finish_reason(event.finish_reason), event.stop_reason)
        return _written([*events, *(made for part in parts for made in _events_of(part))])

    def closing(self) -> str:
        delta = {"type": "message_delta", "delta": self._end, "usage": _usage(self._progress)}
        return _written([delta, {"type": "message_stop"}])

    def failed(self, error: ApiError) -> str:
        return _written([error.anthropic_body])


def _written(events: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"event: {event['type']}\ndata: {json_text(event)}\n\n" for event in events)


def _events_of(event: PartEvent) -> Iterator[Mapping[str, Any]]:
    part, at = event.part, {"index": event.part.index}
    if event.type == "open":
        yield {"type": "content_block_start", **at, "content_block": _block(part, is_begun=True)}
    elif event.type == "close":
        yield {"type": "content_block_stop", **at}
    else:
        kind, field = {
            "text": ("text_delta", "text"),
            "reasoning": ("thinking_delta", "thinking"),
            "call": ("input_json_delta", "partial_json"),
        }[part.kind]
        yield {"type": "content_block_delta", **at, "delta": {"type": kind, field: event.text}}
