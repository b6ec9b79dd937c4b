"""Answers of POST /v1/responses, whole and as OpenAI's events. Knows parts of an answer; knows no request.

A response has every field that OpenAI's and Open Responses' descriptions require, since clients made from these read
no other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from server.api.generation.call import Call
from server.api.generation.parts.answer_parts import Part, PartedAnswer, PartEvent
from server.api.generation.parts.progress import CallProgress
from server.api.generation.responses.schemas import ResponsesBody
from server.api.generation.whole import Choice
from server.api.wire.errors import ApiError
from server.api.wire.json_text import json_text
from server.engine.request import TokenEvent

_PREFIXES = {"text": "msg", "call": "fc", "reasoning": "rs"}
_Event = Mapping[str, Any]


class ResponseShape:
    """One call's response object and its items."""

    def __init__(self, call: Call, body: ResponsesBody, progress: CallProgress) -> None:
        self._call = call
        self._body = body
        self._progress = progress
        self.answer = PartedAnswer(call.form)

    def response(self, status: str, finish_reason: str | None = None) -> dict[str, Any]:
        """The object so far; its usage and items once it has ended."""
        body, has_ended = self._body, status != "in_progress"
        is_cut, params = finish_reason == "length", self._call.requests[0].params
        is_completed = has_ended and not is_cut
        return {
            "id": self._call.id,
            "object": "response",
            "created_at": self._call.created,
            "completed_at": int(time.time()) if is_completed else None,
            "status": "incomplete" if is_cut else status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "model": self._call.target.model,
            "output": [self.item(part, is_done=True, is_cut=is_cut) for part in self.answer.parts] if has_ended else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "text": {"format": body.format},
            "tool_choice": self._tool_choice(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": self._usage() if has_ended else None,
            "user": body.user,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            "metadata": dict(body.metadata or {}),
        }

    def item(self, part: Part, *, is_done: bool, is_cut: bool = False) -> dict[str, Any]:
        """One part as an item of the output, empty when it begins."""
        is_last = part is self.answer.parts[-1]
        status = ("incomplete" if is_cut and is_last else "completed") if is_done else "in_progress"
        common = {"id": self.item_id(part), "status": status}
        content = [content_of(part)] if is_done else []
        if part.kind == "call":
            arguments = part.text if is_done else ""
            call = {"call_id": part.call_id, "name": part.name, "arguments": arguments}
            return {**common, "type": "function_call", **call}
        if part.kind == "reasoning":
            return {**common, "type": "reasoning", "summary": [], "content": content}
        return {**common, "type": "message", "role": "assistant", "content": content}

    def item_id(self, part: Part) -> str:
        return f"{_PREFIXES[part.kind]}_{self._call.id.removeprefix('resp-')}_{part.index}"

    def _tool_choice(self) -> Any:
        choice = self._body.tool_choice
        return choice or "auto" if choice is None or isinstance(choice, str) else choice.model_dump()

    def _usage(self) -> dict[str, Any]:
        usage, form = self._progress.usage(), self._call.form
        uncounted = {"reasoning_tokens": None if form is not None and form.reasoning is not None else 0}
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage.get("completion_tokens_details", uncounted),
            "total_tokens": usage["total_tokens"],
        }


def content_of(part: Part, text: str | None = None) -> dict[str, Any]:
    """The one content part of a message or of reasoning."""
    shown = part.text if text is None else text
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": shown}
    return {"type": "output_text", "text": shown, "annotations": [], "logprobs": []}


def whole_text(call: Call, body: ResponsesBody, choices: Sequence[Choice], progress: CallProgress) -> str:
    """The answer in one piece."""
    shape, choice = ResponseShape(call, body, progress), choices[0]
    shape.answer.feed(choice.text, choice.marks)
    shape.answer.finish()
    return json_text(shape.response("completed", choice.finish_reason))


class ResponseEvents:
    """An `EventWriter` of OpenAI's events, numbered from 0."""

    def __init__(self, call: Call, body: ResponsesBody, progress: CallProgress) -> None:
        self._shape = ResponseShape(call, body, progress)
        self._number = 0
        self._finish_reason: str | None = None

    def chunks(self, index: int, event: TokenEvent) -> str:
        events: list[_Event] = []
        if self._number == 0:
            beginning = self._shape.response("in_progress")
            events += [{"type": f"response.{name}", "response": beginning} for name in ("created", "in_progress")]
        parts = self._shape.answer.feed(event.text, event.marks)
        if event.finish_reason is not None:
            self._finish_reason = event.finish_reason
            parts += self._shape.answer.finish()
        return self._written([*events, *(made for part in parts for made in self._events_of(part))])

    def closing(self) -> str:
        name = "incomplete" if self._finish_reason == "length" else "completed"
        return self._written(
            [{"type": f"response.{name}", "response": self._shape.response(name, self._finish_reason)}]
        )

    def failed(self, error: ApiError) -> str:
        return self._written([{"type": "error", "code": error.code, "message": error.message, "param": error.param}])

    def _written(self, events: Sequence[_Event]) -> str:
        texts = []
        for event in events:
            texts.append(f"event: {event['type']}\ndata: {json_text({**event, 'sequence_number': self._number})}\n\n")
            self._number += 1
        return "".join(texts)

    def _events_of(self, event: PartEvent) -> Iterator[_Event]:
        part = event.part
        at: dict[str, Any] = {"item_id": self._shape.item_id(part), "output_index": part.index}
        inside = at if part.kind == "call" else {**at, "content_index": 0}
        name = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}[part.kind]
        more: dict[str, Any] = {"logprobs": []} if part.kind == "text" else {}
        if event.type == "open":
            yield {
                "type": "response.output_item.added",
                "output_index": part.index,
                "item": self._shape.item(part, is_done=False),
            }
            if part.kind != "call":
                yield {"type": "response.content_part.added", **inside, "part": content_of(part, "")}
        elif event.type == "grow":
            yield {"type": f"response.{name}.delta", **inside, "delta": event.text, **more}
        else:
            yield from self._closed(part, inside, name, more)

    def _closed(self, part: Part, inside: dict[str, Any], name: str, more: dict[str, Any]) -> Iterator[_Event]:
        whole = {"name": part.name, "arguments": part.text} if part.kind == "call" else {"text": part.text}
        yield {"type": f"response.{name}.done", **inside, **whole, **more}
        if part.kind != "call":
            yield {"type": "response.content_part.done", **inside, "part": content_of(part)}
        item = self._shape.item(part, is_done=True, is_cut=self._finish_reason == "length")
        yield {"type": "response.output_item.done", "output_index": part.index, "item": item}
