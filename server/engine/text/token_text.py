"""What one token contributes to the text, as exact bytes. Knows a tokenizer's decoder; knows nothing of requests.

Three kinds of decoder cover the supported families. Any other is refused by name, because decoding token by token could
silently differ from decoding the whole:
- byte-level (GPT-2, Llama-3, Qwen): each character of a token stands for one byte;
- SentencePiece (Llama-2, Mistral, Gemma, Phi-3): "▁" is a space, "<0x41>" is a byte, the text may lose its first space;
- none: tokens are words, joined by spaces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from server.engine.text.special_names import SpecialNames, Symbol

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenText:
    """text: the token's text if no unfinished character precedes it; None if its bytes alone are not UTF-8.

    is_empty: the token is unknown or special, and the text continues as if it were not there.
    """

    raw: bytes
    text: str | None
    is_empty: bool = False


@dataclass(frozen=True, slots=True)
class DecoderRules:
    """What a decoder does to text. replacements: (from, to) in each token, in order.

    strip_left: spaces lost at the start of the whole text. first_drops: a character that the first token loses
    wherever it holds it.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    strip_left: int = 0
    first_drops: str = ""


class TokenTexts:
    """Token id -> TokenText, filled on first use. Safe to share between threads: two may at worst build the same entry.

    Raises ValueError for a decoder that is not one of the kinds above.
    """

    def __init__(self, backend: FastTokenizer) -> None:
        self._backend = backend
        self.rules = _read_rules(backend.decoder)
        self._special = {
            id_: token.content for id_, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._bytes_of = _ByteLevelAlphabet() if self.rules.byte_level else None
        self._known: dict[int, TokenText] = {}
        self._displays: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> TokenText:
        """Empty for special tokens and for ids without a token."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._build(token_id)
        return known

    def first(self, token_id: int) -> TokenText:
        """The text of `token_id` as the first of the whole text. The caller strips spaces."""
        token, drops = self._backend.id_to_token(token_id), self.rules.first_drops
        if token is None or not drops or token_id in self._special:
            return self[token_id]
        return self._decoded(token.replace(drops, ""))

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token, special tokens included; b"" for an id without a token."""
        special = self._special.get(token_id)
        return self[token_id].raw if special is None else special.encode()

    def display(self, token_id: int) -> str:
        """One token as a string. Bytes that are not UTF-8 on their own read "bytes:\\xe4\\xb8", so none collide."""
        text = self._displays.get(token_id)
        if text is None:
            text = self._displays[token_id] = _shown(self.token_bytes(token_id))
        return text

    @cached_property
    def symbols(self) -> Callable[[str], tuple[Symbol, ...]]:
        """A stop string as characters, with ids in place of special tokens' names; cached for further choices."""
        return lru_cache(maxsize=64)(SpecialNames(self._special).symbols)

    def _build(self, token_id: int) -> TokenText:
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._special:
            return TokenText(b"", "", is_empty=True)
        return self._decoded(token)

    def _decoded(self, token: str) -> TokenText:
        if self._bytes_of is not None:
            raw = self._bytes_of(token)
            return TokenText(raw, _text_of(raw))
        for old, new in self.rules.replacements:
            token = token.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(token) if self.rules.byte_fallback else None
        if match:
            raw = bytes.fromhex(match[1])
            return TokenText(raw, _text_of(raw))
        text = self.rules.prefix + token
        return TokenText(text.encode(), text)


class _ByteLevelAlphabet:
    """GPT-2's printable characters for the 256 bytes, mapped back to bytes."""

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        characters = [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]
        self._byte_of = dict(zip(characters, printable + others, strict=True))

    def __call__(self, token: str) -> bytes:
        """The token's bytes. A token with any other character (an added one) is its own UTF-8."""
        values = [self._byte_of.get(character) for character in token]
        known = [value for value in values if value is not None]
        return bytes(known) if len(known) == len(values) else token.encode()


def _shown(raw: bytes) -> str:
    text = _text_of(raw)
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if text is None else text


def _text_of(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _read_rules(decoder: Any) -> DecoderRules:
    if decoder is None:
        return DecoderRules(prefix=" ", strip_left=1)
    steps = _flatten(json.loads(decoder.__getstate__()))
    rules, fused = DecoderRules(), False
    for step in steps:
        kind = step["type"]
        reader = _READERS.get(kind)
        strips_whole_text = kind == "Strip" and fused and step["content"] == " " and step["stop"] == 0
        is_alone = kind not in ("ByteLevel", "Metaspace") or len(steps) == 1
        if kind == "Fuse":
            fused = True
        elif strips_whole_text:
            rules = replace(rules, strip_left=step["start"])
        elif reader is None or fused or not is_alone:
            names = ", ".join(entry["type"] for entry in steps)
            raise ValueError(
                f"the tokenizer's decoder [{names}] is not supported: {kind} cannot be read token by token"
            )
        else:
            rules = reader(rules, step)
    return rules


def _flatten(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [step for entry in state["decoders"] for step in _flatten(entry)]


def _read_replace(rules: DecoderRules, step: dict[str, Any]) -> DecoderRules:
    if rules.byte_fallback or "String" not in step["pattern"]:
        raise ValueError(f"the tokenizer's decoder step {step} is not supported")
    return replace(rules, replacements=(*rules.replacements, (step["pattern"]["String"], step["content"])))


def _read_metaspace(rules: DecoderRules, step: dict[str, Any]) -> DecoderRules:
    mark = step["replacement"]
    first_drops = "" if step["prepend_scheme"] == "never" else mark
    return replace(rules, replacements=((mark, " "),), first_drops=first_drops)


_READERS: dict[str, Callable[[DecoderRules, dict[str, Any]], DecoderRules]] = {
    "ByteLevel": lambda rules, _: replace(rules, byte_level=True),
    "ByteFallback": lambda rules, _: replace(rules, byte_fallback=True),
    "Replace": _read_replace,
    "Metaspace": _read_metaspace,
}
