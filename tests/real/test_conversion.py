"""SmolLM2 as its GGUF file says: values as transformers reads them, tokens as llama.cpp's rules cut them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from adapters_store.base.converted.header import read_header
from adapters_store.base.tokenizer import load_tokenizer

TEXTS = (
    "Hello, world! It's  2024.",
    "naïve café, ΑΒΓ αβγ",
    "Привет, мир",
    "你好世界",
    "こんにちは",
    "नमस्ते दुनिया",
    "مرحبا بالعالم",
    "🙂🙃 👩‍👩‍👧",
    "def f(x):\n\treturn  x + 12345\n",
)


def test_every_weight_is_what_transformers_reads(file: Path, base: Path) -> None:
    oracle = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    ours = load_file(base / "model.safetensors")
    assert set(oracle) - set(ours) == {"lm_head.weight"}  # tied
    assert [name for name in ours if not torch.equal(ours[name], oracle[name].to(torch.bfloat16))] == []


def test_tokens_come_back_as_the_text_and_digits_stand_alone(file: Path, base: Path) -> None:
    tokenizer = load_tokenizer(base)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("in  2024"))
    assert pieces == ["in", "ĠĠ", "2", "0", "2", "4"]
    asked = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.chat_template == read_header(file).metadata["tokenizer.chat_template"]
