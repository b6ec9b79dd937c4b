"""Greedy answers from a transformers model, for the scripts and tests that judge what was trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from server.demo.recipe.tokenizer import END_OF_TURN


def greedy_answers(model: Any, tokenizer: Any, prompts: list[str], *, max_new_tokens: int = 96) -> list[str]:
    """The greedy answer to each prompt as a chat of one turn, cut at `max_new_tokens`."""
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    return greedy_completions(model, tokenizer, chats, max_new_tokens=max_new_tokens)


@torch.inference_mode()
def greedy_completions(model: Any, tokenizer: Any, texts: list[str], *, max_new_tokens: int = 96) -> list[str]:
    """The greedy continuation of each text, which carries its own begin token."""
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    width = batch["input_ids"].shape[1]
    tokens: Tensor = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)],
        pad_token_id=tokenizer.pad_token_id,
    )
    return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens[:, width:]]
