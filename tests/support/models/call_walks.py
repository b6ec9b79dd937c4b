"""Random answers that a grammar accepts, token by token. Knows llguidance and a tokenizer; knows no reader."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import llguidance
import llguidance.numpy as masks
import numpy as np
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from server.engine.text.tokenizer import Tokenizer

_ENDS = ('"', '"}', '",', "}", "}}", "]", ",", ", ", "\n", ">", "1", "true", "null", " ")


class Walker:
    """One tokenizer, prepared once. end_id: the token that ends an answer."""

    def __init__(self, core: FastTokenizer, end_name: str) -> None:
        wrapped = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end_name)
        self.tokenizer = Tokenizer(wrapped)
        self.end_id = core.token_to_id(end_name)
        self.special_ids = {id_ for id_, token in core.get_added_tokens_decoder().items() if token.special}
        self._compiled = llguidance.LLTokenizer(core.to_str(), eos_token=self.end_id)
        self._bits = masks.allocate_token_bitmask(1, self._compiled.vocab_size)
        ends = {text: core.encode(text, add_special_tokens=False).ids for text in _ENDS}
        self._ends = [ids[0] for ids in ends.values() if len(ids) == 1]

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """Raises AssertionError for a grammar that llguidance refuses."""
        matcher = llguidance.LLMatcher(self._compiled, grammar)
        assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar}"
        return matcher

    def allowed(self, matcher: llguidance.LLMatcher) -> np.ndarray:
        """Ids that may come next."""
        return np.flatnonzero(self._flags(matcher))

    def _flags(self, matcher: llguidance.LLMatcher) -> np.ndarray:
        """For each id, 1 if it may come next."""
        masks.fill_next_token_bitmask(matcher, self._bits, 0)
        return np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._compiled.vocab_size]

    def walk(
        self,
        grammar: str,
        random: Random,
        *,
        preferred: Sequence[int] = (),
        max_tokens: int = 160,
        start: Sequence[int] = (),
    ) -> list[int]:
        """Token ids after `start`, without the end token; one that reaches max_tokens is an answer cut short.

        Half of the steps, and all of the last ones, go to what ends something: a uniform walk would stay in its first
        string."""
        matcher, ids = self.matcher(grammar), list[int]()
        assert matcher.consume_tokens(list(start)), matcher.get_error()
        likely = [self.end_id, *preferred, *self._ends]
        while len(ids) < max_tokens:
            flags = self._flags(matcher)
            assert flags.any(), f"no token may follow {self.tokenizer.decode(ids)!r}: {matcher.get_error()}"
            wanted = [id_ for id_ in likely if flags[id_]]
            goes_on = not wanted or (random.random() < 0.5 and len(ids) < max_tokens // 2)
            token = int(random.choice(np.flatnonzero(flags) if goes_on else wanted))
            if token == self.end_id:
                return ids
            ids.append(token)
            assert matcher.consume_token(token), matcher.get_error()
        return ids
