"""A tokenizer and a model that do not agree on the ids: what is refused, and what is never sampled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from server.engine.request import InvalidRequest
from server.engine.text.vocabulary import Vocabulary
from support.models.models import peft_model, save_base
from support.models.tokenizer_zoo import wrapped
from support.servers.service import Service, make_base, running
from support.worlds.driven_engine import driven

NUM_ROWS, NUM_TOKENS = 448, 418  # the byte-level tokenizer has 418 tokens
PROMPTS = [[70, 71, 72, 73], [200, 90, 91], [101, 102, 103, 104, 105]]
HOLES = (5, 40)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1, -1], "token id -1 is not in [0, 6)"),
        ([6], "token id 6 is not in [0, 6)"),
        ([10**12], "token id 1000000000000 is not in [0, 6)"),
        ([0, 3], "token id 3 has no token in this model's tokenizer"),
        ([8], "token id 8 is '[PAD]', for which the model has no embedding row (it has 8)"),
    ],
)
def test_an_id_without_a_token_or_without_a_row_is_refused_by_name(ids: list[int], words: str) -> None:
    vocabulary = Vocabulary(8, {"a": 0, "b": 1, "c": 2, "d": 4, "e": 5, "[PAD]": 8})
    vocabulary.check([0, 1, 2, 4, 5, 5], "prompt")
    vocabulary.check([], "prompt")
    with pytest.raises(InvalidRequest) as refusal:
        vocabulary.check(ids, "prompt")
    assert (refusal.value.param, refusal.value.message) == ("prompt", f"prompt: {words}")


def test_a_tokenizer_none_of_whose_tokens_has_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"none of the tokenizer's 1 tokens has one of the 8 rows"):
        Vocabulary(8, {"a": 8})


def prefer(base: Path, token_ids: list[int]) -> None:
    """Make the base prefer these ids to all others after any prompt."""
    model = peft_model(base, None)
    with torch.no_grad():
        model.lm_head.weight[token_ids] *= 30.0  # type: ignore[index, operator, union-attr]
    model.save_pretrained(base)  # type: ignore[operator]


def with_holes() -> Tokenizer:
    """Words and bytes; no token has the ids in HOLES, between others that have one."""
    words = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "The", "▁lease"]
    free = [id_ for id_ in range(len(words) + len(HOLES)) if id_ not in HOLES]
    core = Tokenizer(models.BPE(dict(zip(words, free, strict=True)), [], byte_fallback=True, unk_token="<unk>"))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return core


def padded_base(folder: Path) -> tuple[Path, list[int]]:
    base = make_base(folder, vocab_size=NUM_ROWS)
    return base, list(range(NUM_TOKENS, NUM_ROWS))


def base_with_holes(folder: Path) -> tuple[Path, list[int]]:
    base = save_base(folder, "llama", vocab_size=300)
    core = with_holes()
    wrapped(core).save_pretrained(base)
    return base, [*HOLES, *range(1 + max(core.get_vocab().values()), 300)]


@pytest.fixture(scope="module", params=[padded_base, base_with_holes])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Any]]:
    """A service whose base prefers ids without a token to all others, and these ids."""
    folder = tmp_path_factory.mktemp("vocabulary")
    base, unknown = request.param(folder / "base")
    prefer(base, unknown)
    with running(base, {}, folder / "data") as service:
        yield service, (base, unknown)


def masked_logprobs(base: Path, unknown: list[int], ids: list[int]) -> torch.Tensor:
    """transformers' log-probabilities after each token, [T, W], ids without a token masked."""
    with torch.inference_mode():
        logits: torch.Tensor = peft_model(base, None)(torch.tensor([ids])).logits[0]
        logits[:, unknown] = -torch.inf
        return logits.log_softmax(-1)


def test_the_base_prefers_ids_without_a_token(world: tuple[Service, Any]) -> None:
    """Otherwise the tests below could not fail."""
    _, (base, unknown) = world
    with torch.inference_mode():
        best = [int(peft_model(base, None)(torch.tensor([prompt])).logits[0, -1].argmax()) for prompt in PROMPTS]
    assert set(best) <= set(unknown)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 2.0, "seed": 1},
        {"temperature": 2.0, "seed": 2, "top_k": 50},
        {"temperature": 2.0, "seed": 3, "top_p": 0.99, "min_p": 1e-6},
        {"temperature": 1.0, "seed": 4, "repetition_penalty": 0.1, "frequency_penalty": -2.0},
        {"temperature": 2.0, "seed": 5, "min_tokens": 16, "stop_token_ids": (80, 81), "logit_bias": ((90, -100.0),)},
    ],
)
def test_an_id_without_a_token_is_never_sampled_nor_offered(world: tuple[Service, Any], params: dict[str, Any]) -> None:
    service, (_, unknown) = world
    for prompt in PROMPTS:
        answer = service.ask(prompt, logprobs=20, prompt_logprobs=20, **params)[1].collect()
        assert answer[-1].error is None
        sampled = {token for event in answer for token in event.token_ids}
        entries = [entry for event in answer for entry in (*(event.logprobs or ()), *(event.prompt_logprobs or ()))]
        offered = {id_ for entry in entries if entry is not None for id_, _ in entry.top}
        assert len(offered) >= 20
        assert (sampled | offered).isdisjoint(unknown)


def test_log_probabilities_are_those_of_transformers_with_that_mask(world: tuple[Service, Any]) -> None:
    service, (base, unknown) = world
    for prompt in PROMPTS:
        answer = service.ask(prompt, max_tokens=6, logprobs=5, prompt_logprobs=3)[1].collect()
        sampled = [token for event in answer for token in event.token_ids]
        ids = [*prompt, *sampled]
        expected = masked_logprobs(base, unknown, ids)
        assert sampled == expected[len(prompt) - 1 : -1].argmax(-1).tolist()
        scored = [entry for event in answer for entry in (*(event.prompt_logprobs or ()), *(event.logprobs or ()))]
        for position, entry in enumerate(scored[1:]):
            assert entry is not None
            assert entry.logprob == pytest.approx(float(expected[position, ids[position + 1]]), abs=1e-3)
            for id_, logprob in entry.top:
                assert logprob == pytest.approx(float(expected[position, id_]), abs=1e-3)


def test_recorded_steps_mask_the_same_ids(world: tuple[Service, Any], tmp_path: Path) -> None:
    service, (base, unknown) = world
    with driven(base, {}, tmp_path / "data") as engine:
        for index, prompt in enumerate(PROMPTS):
            engine.add(f"r{index}", prompt)
        engine.drain()
        assert engine.counters["steps_ahead"] > 0
        for index, prompt in enumerate(PROMPTS):
            assert engine.tokens(f"r{index}") == service.tokens(prompt, max_tokens=24)
            assert set(engine.tokens(f"r{index}")).isdisjoint(unknown)


def test_a_base_with_fewer_rows_than_tokens_serves_those_that_have_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base(tmp_path / "base", vocab_size=NUM_TOKENS - 1)
    with running(base, {}, tmp_path / "data") as service:
        assert service.worker.vocabulary.size == NUM_TOKENS - 1
        assert len(service.tokens(PROMPTS[0])) == 16
        with pytest.raises(InvalidRequest, match=r"token id 417 is 'née 中', for which the model has no embedding row"):
            service.worker.vocabulary.check([417], "prompt")
    assert "1 tokens have no embedding row; prompts with them are refused: 417 'née 中'" in caplog.text
