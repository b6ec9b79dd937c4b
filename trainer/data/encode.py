"""Records to tokens with weights, as serving will see them. Knows one tokenizer; knows no files and no packing.

Served prompts are rendered, then encoded without added special tokens (chats) or with them (plain prompts); so are
texts here. A token is learned where its characters lie in a learned span; where a token would straddle the border of a
span, the text is cut there, because serving cuts there too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from adapters_store.format.invocation import last_place
from adapters_store.parsing.strict_json import shown
from trainer.data.examples import Examples
from trainer.data.problems import LineRefused, ProblemList, excerpt_of
from trainer.data.records import Record
from trainer.data.template import RenderedText, Span, check_calls, dialect_for, render_chat, template_of
from trainer.data.types import EncodedExample
from trainer.spec import TooLong

_CURE = "batch.too_long: truncate cuts such examples, drop leaves them out"
Tokens = tuple[NDArray[np.int32], NDArray[np.float32]]


class Encoder:
    """One tokenizer's way from a record to tokens. Raises ValueError for a tokenizer that is not fast.

    num_embeddings: rows of the model's embedding, if known; a token beyond them is refused with its line.
    tool_dialect: in which calls are written, chat_template: how chats are; None: the base's own.
    too_long: what happens to a longer example: "refuse", "truncate" to its first tokens, or "drop". num_too_long: how
    many there were. The two texts of a preference pair have max_pair_tokens together.
    invocation: the tokens that switch an activated LoRA on. Only each example's last answer is learned then, which must
    follow them; the prompt of a served request ends before it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_sequence_length: int,
        max_pair_tokens: int | None = None,
        num_embeddings: int | None = None,
        tool_dialect: str | None = None,
        chat_template: str | None = None,
        too_long: TooLong = "refuse",
        invocation: tuple[int, ...] = (),
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} has no fast form (tokenizer.json), which training needs")
        self.max_sequence_length = max_sequence_length
        self._max_pair_tokens = max_pair_tokens or max_sequence_length
        self.num_too_long = 0
        self._too_long = too_long
        self._invocation = invocation
        self._num_embeddings = num_embeddings
        self._dialect = dialect_for(tokenizer, tool_dialect, chat_template)
        self._render = template_of(tokenizer, self._dialect, chat_template)
        self._backend: FastTokenizer = FastTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._eos_id = tokenizer.eos_token_id
        special = (id_ for id_, token in self._backend.get_added_tokens_decoder().items() if token.special)
        self._special_ids = frozenset(special)

    def encode(self, record: Record, *, line: int = 0, digest: bytes = b"") -> list[EncodedExample]:
        """One example, or one per answer if the template needs a chat unrolled. Raises LineRefused."""
        if record.rejected is not None:
            pair = self._pair(record, record.rejected)
            return [] if pair is None else [EncodedExample(*pair, digest, line, record.kind)]
        return [
            EncodedExample(fitting[0], self._checked(*fitting), digest, line, record.kind)
            for ids, weights in self._learned(record)
            if (fitting := self._fitting(ids, weights)) is not None
        ]

    def _learned(self, record: Record) -> list[Tokens]:
        """Its texts; for an activated LoRA its last answer alone, of a chat that is unrolled, too."""
        texts = self._tokens(record)
        return [self._activated(*texts[-1])] if self._invocation else texts

    def _activated(self, ids: NDArray[np.int32], weights: NDArray[np.float32]) -> Tokens:
        """Raises LineRefused if the last place of the invocation's tokens is not in the prompt of the last answer."""
        ids, weights = _up_to_last_learned(ids, weights)
        context = np.flatnonzero(np.append(0.0, weights[1:]) == 0)  # nothing predicts the first token
        start = int(context[-1]) + 1
        place = last_place(ids.tolist(), self._invocation)
        if place is None or place + len(self._invocation) > start:
            what = "no prompt before the last answer" if place is None else "the last answer"
            message = f"{what} holds adapter.alora_invocation_tokens {shown(list(self._invocation))}"
            raise LineRefused("invocation_missing" if place is None else "invocation_in_answer", message)
        return ids, np.where(np.arange(len(ids)) < start, np.float32(0), weights)

    def _pair(self, chosen: Record, rejected: Record) -> Tokens | None:
        """The chosen text, then the rejected one, its weights negative; None if it is dropped."""
        sides = [self._one_text(chosen), self._one_text(rejected)]
        limit, lengths = self._max_pair_tokens, [len(ids) for ids, _ in sides]
        if sum(lengths) > limit or max(lengths) > self.max_sequence_length:
            if self._too_long == "refuse":
                too_long = f"the pair has {sum(lengths)} tokens, at most {limit} fit"
                if sum(lengths) <= limit:
                    too_long = f"a text of the pair has {max(lengths)} tokens, at most {self.max_sequence_length} fit"
                raise LineRefused("sequence_too_long", f"{too_long}; {_CURE}")
            self.num_too_long += 1
            each = min(limit // 2, self.max_sequence_length)
            sides = [_up_to_last_learned(ids[:each], weights[:each]) for ids, weights in sides]
            if self._too_long == "drop" or not all(weights[1:].any() for _, weights in sides):
                return None
        for ids, weights in sides:
            self._checked(ids, weights)
        (better, learned), (worse, unlearned) = sides
        return np.concatenate([better, worse]), np.concatenate([learned, -unlearned])

    def _one_text(self, record: Record) -> Tokens:
        """Raises LineRefused for a chat that is unrolled."""
        (ids, weights), *more = self._tokens(record)
        if more:
            message = "the base's chat template shows the answers of a pair apart: pairs of one answer each are needed"
            raise LineRefused("template_not_prefix", message)
        return _up_to_last_learned(ids, weights)

    def _fitting(self, ids: NDArray[np.int32], weights: NDArray[np.float32]) -> Tokens | None:
        """What of it is learned; None if it is dropped. A cut that leaves no learned token drops the example."""
        if len(ids) <= self.max_sequence_length or self._too_long == "refuse":
            return ids, weights
        self.num_too_long += 1
        kept = weights[: self.max_sequence_length]
        if self._too_long == "drop" or not kept[1:].any():
            return None
        return ids[: self.max_sequence_length], kept

    def _tokens(self, record: Record) -> list[Tokens]:
        if record.kind == "chat":
            check_calls(record.messages, self._dialect)
            texts = render_chat(record.messages, lambda shown, opens: self._render(shown, record.tools, opens))
            return [self._chat_tokens(text) for text in texts]
        if record.kind == "completion":
            return [self._completion_tokens(record.prompt, record.completion)]
        return [self._completion_tokens("", record.completion)]

    def _checked(self, ids: NDArray[np.int32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weights, the first token's 0. Raises LineRefused for what is too long, unreadable or teaches nothing."""
        if len(ids) > self.max_sequence_length:
            message = f"the example has {len(ids)} tokens, at most {self.max_sequence_length} fit; {_CURE}"
            raise LineRefused("sequence_too_long", message)
        self._check_rows(ids)
        weights[0] = 0.0
        if not weights.any():
            raise LineRefused("nothing_supervised", "no token of the example is learned")
        return weights

    def _check_rows(self, ids: NDArray[np.int32]) -> None:
        """Raises LineRefused for a token that the model cannot read."""
        if self._num_embeddings is None or ids.max() < self._num_embeddings:
            return
        bad = int(ids[ids >= self._num_embeddings][0])
        token = excerpt_of(self._backend.id_to_token(bad))
        message = f"token {token} has id {bad}, the base has {self._num_embeddings} embedding rows"
        raise LineRefused("token_without_embedding", message)

    def _completion_tokens(self, prompt: str, completion: str) -> Tokens:
        """The prompt as serving encodes it, then what follows it, closed by the end token."""
        head = self._backend.encode(prompt).ids
        whole = self._backend.encode(prompt + completion).ids
        is_prefix = whole[: len(head)] == head and len(whole) > len(head)
        tail = whole[len(head) :] if is_prefix else self._backend.encode(completion, add_special_tokens=False).ids
        if self._eos_id is not None and tail[-1:] != [self._eos_id]:
            tail = [*tail, self._eos_id]
        return _joined([(head, 0.0), (tail, 1.0)])

    def _chat_tokens(self, rendered: RenderedText) -> Tokens:
        encoding = self._backend.encode(rendered.text, add_special_tokens=False)
        borders = {border for span in rendered.spans for border in (span.start, span.stop)}
        if any(start < border < stop for start, stop in encoding.offsets for border in borders):
            return self._cut_tokens(rendered)
        weights = _weights(encoding, rendered.spans)
        return np.array(encoding.ids, dtype=np.int32), self._without_what_follows_the_turn(encoding.ids, weights)

    def _cut_tokens(self, rendered: RenderedText) -> Tokens:
        pieces: list[tuple[list[int], float]] = []
        end = 0
        for span in rendered.spans:
            between, learned = rendered.text[end : span.start], rendered.text[span.start : span.stop]
            pieces.append((self._backend.encode(between, add_special_tokens=False).ids, 0.0))
            pieces.append((self._backend.encode(learned, add_special_tokens=False).ids, span.weight))
            end = span.stop
        pieces.append((self._backend.encode(rendered.text[end:], add_special_tokens=False).ids, 0.0))
        ids, weights = _joined(pieces)
        return ids, self._without_what_follows_the_turn(ids.tolist(), weights)

    def _without_what_follows_the_turn(self, ids: list[int], weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Blanks that a template puts behind the end-of-turn token are never generated, so they are not learned."""
        ends = np.flatnonzero((weights > 0) & (np.append(weights[1:], 0.0) == 0))
        for end in ends.tolist():
            last = end
            while last and weights[last] and ids[last] not in self._special_ids and self._is_blank(ids[last]):
                last -= 1
            if weights[last] and ids[last] in self._special_ids:
                weights[last + 1 : end + 1] = 0.0
        return weights

    def _is_blank(self, token_id: int) -> bool:
        return not self._backend.decode([token_id], skip_special_tokens=False).strip()


def _up_to_last_learned(ids: NDArray[np.int32], weights: NDArray[np.float32]) -> Tokens:
    """What follows changes no loss; and the last learned token marks where a pair's second text begins."""
    learned = np.flatnonzero(weights)
    end = int(learned[-1]) + 1 if len(learned) else len(ids)
    return ids[:end], weights[:end]


def _joined(pieces: list[tuple[list[int], float]]) -> Tokens:
    ids = np.array([id_ for piece, _ in pieces for id_ in piece], dtype=np.int32)
    weights = np.repeat(
        np.array([weight for _, weight in pieces], dtype=np.float32), [len(piece) for piece, _ in pieces]
    )
    return ids, weights


def _weights(encoding: Encoding, spans: tuple[Span, ...]) -> NDArray[np.float32]:
    starts = np.array([start for start, _ in encoding.offsets])
    weights = np.zeros(len(starts), dtype=np.float32)
    for span in spans:
        weights[(starts >= span.start) & (starts < span.stop)] = span.weight
    return weights


def encode_all(records: Iterable[tuple[int, bytes, Record]], encoder: Encoder, *, what: str = "data") -> Examples:
    """Every record's examples, in order. Raises DataRejected with every line that cannot be encoded, all counted."""
    problems = ProblemList(what=what)
    examples = Examples.of(_encoded(records, encoder, problems))
    problems.raise_if_any()
    return examples


def _encoded(
    records: Iterable[tuple[int, bytes, Record]], encoder: Encoder, problems: ProblemList
) -> Iterator[EncodedExample]:
    for line, digest, record in records:
        try:
            yield from encoder.encode(record, line=line, digest=digest)
        except LineRefused as error:
            problems.add(error.at(line))
