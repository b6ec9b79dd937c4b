"""Small tokenizers with the decoders of the families we serve, built here from nothing."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SAMPLE_TEXT = [
    "The tenant's lease ends on 31 May; notice is due two months before.",
    "def area(r):\n    return 3.14 * r ** 2\n",
    "Ärzte prüfen täglich über 100 Fälle. ¿Qué pasa? 日本語のテキスト。 नमस्ते 👩‍👩‍👧 🇩🇪 ok 👍🏽",
]
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_METASPACE_WORDS = [
    "▁",
    "▁▁",
    "▁The",
    "The",
    "▁te",
    "nant",
    "▁lease",
    "s",
    "a",
    "b",
    "x▁y",
    "é",
    "日",
    "本",
    "▁日",
    "👍",
    ".",
]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama-3 and Qwen: every byte has a token, longer tokens may end inside a character."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    core.train_from_iterator(SAMPLE_TEXT, trainer)
    core.add_tokens([AddedToken("中文"), AddedToken("née 中")])
    return core


def _sentencepiece(decoder: decoders.Decoder) -> Tokenizer:
    words = [*SPECIAL, "<unk>", *_BYTES, *_METASPACE_WORDS]
    vocab = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    core.decoder = decoder
    core.add_special_tokens(SPECIAL)
    core.add_tokens([AddedToken(" two  words ")])
    return core


def llama2() -> Tokenizer:
    """Byte fallback; the text loses its first space."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _sentencepiece(decoders.Sequence(steps))


def gemma() -> Tokenizer:
    """Byte fallback; no space is lost."""
    return _sentencepiece(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


def metaspace() -> Tokenizer:
    """No byte fallback; the first token loses its spaces."""
    return _sentencepiece(decoders.Metaspace())


def words() -> Tokenizer:
    """No decoder at all: words joined by spaces."""
    return _sentencepiece(None)


ZOO = {"byte_level": byte_level, "llama2": llama2, "gemma": gemma, "metaspace": metaspace, "words": words}


def wrapped(core: Tokenizer, *, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """The same tokenizer as transformers loads it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer
