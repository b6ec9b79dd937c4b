"""Makes the demo's base from nothing: a tokenizer and a tiny Llama, trained on text this project writes.

`python -m server.demo.recipe.make_base --out DIR` takes about two minutes on two cores. The adapters stand on its exact
weights, so make them again afterwards.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from server.demo.assets import BASE_FOLDER
from server.demo.recipe.corpus import Dialogue, base_documents
from server.demo.recipe.encoding import Sample, encode
from server.demo.recipe.questions import held_out_questions
from server.demo.recipe.sampling import greedy_answers
from server.demo.recipe.tokenizer import END_OF_TURN, MAX_TOKENS, train_tokenizer
from server.demo.recipe.training import Schedule, train

DOCUMENTS = 20_000
VOCABULARY = 2048
CHAT_SHARE = 0.8  # the rest of the dialogues are read as prompt and completion


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """A Llama of two million weights with grouped-query attention and tied embeddings, freshly initialised."""
    torch.manual_seed(seed)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    return model


def make_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings and norms: half the loss of AdamW alone after the same time."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[Dialogue | str], seed: int) -> list[Sample]:
    """Every document, most dialogues as chat and some as plain prompt and completion; every token is learned."""
    rng = random.Random(seed)
    return [encode(tokenizer, text, as_chat=rng.random() < CHAT_SHARE, answers_only=False) for text in documents]


def plain_text(document: Dialogue | str) -> str:
    """The document's words, without roles: what the tokenizer learns from."""
    if isinstance(document, str):
        return document
    return "\n".join(message["content"] for message in document.messages())


def make_base(out: Path, console: Console, *, num_documents: int = DOCUMENTS, seed: int = 0) -> list[float]:
    """Write tokenizer, config and bfloat16 weights to `out`. Returns the loss of every step, in nats per token."""
    documents = base_documents(num_documents, seed)
    tokenizer = train_tokenizer(map(plain_text, documents), VOCABULARY)
    model = make_model(tokenizer, seed)
    samples = encode_documents(tokenizer, documents, seed)
    tokens = sum(len(sample.ids) for sample in samples)
    console.print(f"{model.num_parameters():,} weights, {len(samples):,} documents, {tokens:,} tokens")
    losses = train(model, samples, make_optimizers(model), Schedule(seed=seed), title="base", console=console)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    console.print(f"loss {losses[0]:.2f} -> {sum(losses[-20:]) / len(losses[-20:]):.2f}, saved in {out}")
    show_samples(model.float().eval(), tokenizer, console)  # many CPUs have no instructions for bfloat16
    return losses


def show_samples(model: Any, tokenizer: PreTrainedTokenizerFast, console: Console) -> None:
    """A few held-out prompts and what the model says."""
    prompts = [question.prompt for question in held_out_questions(6)]
    for prompt, answer in zip(prompts, greedy_answers(model, tokenizer, prompts), strict=True):
        console.print(f"[bold]{prompt}[/bold]\n  {answer}", highlight=False)


def main(
    out: Annotated[Path, typer.Option(help="folder to write")] = BASE_FOLDER,
    documents: Annotated[int, typer.Option(min=16, help="documents to read; fewer is faster and worse")] = DOCUMENTS,
    seed: Annotated[int, typer.Option(help="another seed gives another corpus and another model")] = 0,
) -> None:
    """Train the demo's base model and its tokenizer."""
    disable_progress_bar()
    make_base(out, Console(), num_documents=documents, seed=seed)


if __name__ == "__main__":
    typer.run(main)
