"""Decides what text a request shows and when it ends. Knows tokens, text and stop rules; knows nothing of tensors.

A request ends at the first of: an end-of-sequence token, a stop token, a stop string, max_tokens tokens. Its first
min_tokens tokens can end it by length only: a stop string must have its last character in a later token's text. A stop
string that names a special token ends the request at that token, and takes precedence over the token as an end of
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from server.engine.request import FinishReason, Mark, ReasoningIds, SamplingParams
from server.engine.text.detokenizer import Detokenizer
from server.engine.text.stop_strings import Match, StopMatcher
from server.engine.text.token_text import TokenTexts


class OutputDelta(NamedTuple):
    """text: newly released. stop_reason: the stop string or token id that ended it; None for end-of-sequence. marks:
    places of markers' tokens in the text."""

    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    marks: tuple[Mark, ...] = ()

    def followed_by(self, rest: OutputDelta) -> OutputDelta:
        """Both as one."""
        marks = ((len(self.text) + place, id_) for place, id_ in rest.marks)
        return rest._replace(text=self.text + rest.text, marks=(*self.marks, *marks))


class OutputState:
    """The text of one request as it grows. Append every sampled token once, until there is a finish reason.

    prompt_ids: what the output continues (see `Detokenizer`). eos_ids: tokens that end a sequence.
    """

    def __init__(
        self,
        params: SamplingParams,
        token_texts: TokenTexts,
        eos_ids: frozenset[int],
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._params = params
        self._token_texts = token_texts
        self._detokenizer = Detokenizer(token_texts, prompt_ids)
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids.union(params.end_ids)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._matcher = StopMatcher(params.stop, token_texts.symbols) if params.stop else None
        self._held = ""
        self._open_marks: list[Mark] = []  # of text that is held back; places in the whole text
        self._num_read = self._num_shown = 0  # characters of the whole text
        self._reasoning = params.reasoning  # None: it has ended, or there is none
        self._is_reasoning = params.reasoning is not None and params.reasoning.open is None
        self.num_tokens = 0
        self.num_reasoning_tokens = 0  # the marks that open and close it are counted too

    def append(self, token_id: int) -> OutputDelta:
        """One more token. The released text may be empty. Nothing may be appended after a finish reason."""
        if token_id in self._params.mark_ids:
            self._open_marks.append((self._num_read, token_id))
        if self._reasoning is not None:
            self._count_reasoning(self._reasoning, token_id)
        return self._counted(self._append(token_id))

    def _count_reasoning(self, ids: ReasoningIds, token_id: int) -> None:
        """The answer's first token that is text or a mark may open the reasoning, no later one."""
        is_passed_over = token_id not in self._params.mark_ids and self._token_texts[token_id].is_empty
        if is_passed_over and not self._is_reasoning:
            return
        self._is_reasoning = self._is_reasoning or token_id == ids.open
        self.num_reasoning_tokens += self._is_reasoning
        if not self._is_reasoning or token_id == ids.close:
            self._reasoning = None

    def _counted(self, delta: OutputDelta) -> OutputDelta:
        start = self._num_shown
        self._num_shown += len(delta.text)
        self._num_read = self._num_shown + len(self._held)
        if not self._open_marks:
            return delta
        shown = [mark for mark in self._open_marks if mark[0] <= self._num_shown]
        self._open_marks = self._open_marks[len(shown) :]
        return delta._replace(marks=tuple((place - start, id_) for place, id_ in shown))

    def _append(self, token_id: int) -> OutputDelta:
        self.num_tokens += 1
        may_stop = self.num_tokens > self._params.min_tokens
        match = self._match_special(token_id, may_match=may_stop)
        if match is not None:
            return self._end_at_special(match)
        if may_stop and (token_id in self._eos_ids or token_id in self._stop_ids):
            return self._release("", "stop", None if token_id in self._eos_ids else token_id)
        text = self._detokenizer.append(token_id)
        is_last = self.num_tokens >= self._params.max_tokens
        if self._matcher is None and not is_last:
            return OutputDelta(text)
        return self._release(text, "length" if is_last else None, None)

    def finish(self, reason: FinishReason) -> OutputDelta:
        """End the request from outside (for example: the context is full). All held text is released."""
        return self._counted(self._release("", reason, None))

    def _release(self, text: str, reason: FinishReason | None, stop_reason: int | None) -> OutputDelta:
        if reason is not None:
            text += self._detokenizer.flush()
        if self._matcher is None:
            return OutputDelta(text, reason, stop_reason)
        match = self._matcher.feed(text, may_match=self.num_tokens > self._params.min_tokens)
        if match is not None:
            return self._end_at_match(match, text)
        text = self._held + text
        num_held = 0 if reason else self._matcher.num_open
        self._held = text[len(text) - num_held :]
        return OutputDelta(text[: len(text) - num_held], reason, stop_reason)

    def _match_special(self, token_id: int, *, may_match: bool) -> Match | None:
        matcher = self._matcher
        if matcher is None or not matcher.reads_special or not self._token_texts[token_id].is_empty:
            return None
        return matcher.feed_special(token_id, may_match=may_match, is_mid_character=self._detokenizer.is_mid_character)

    def _end_at_special(self, match: Match) -> OutputDelta:
        text = self._detokenizer.flush()
        assert self._matcher is not None
        earlier = self._matcher.feed(text, may_match=True)
        return self._end_at_match(earlier or replace(match, end=len(text)), text)

    def _end_at_match(self, match: Match, text: str) -> OutputDelta:
        end = len(self._held) + match.end - match.num_shown
        text, self._held = (self._held + text)[:end], ""
        return OutputDelta(text, "stop", match.stop)
