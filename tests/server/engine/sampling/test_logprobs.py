from __future__ import annotations

import json
import math

import pytest
import torch

from server.engine.request import Request, SamplingParams
from server.engine.sampling import logprobs as logprobs_module
from server.engine.sampling.logprobs import LOWEST_LOGPROB, token_logprobs
from server.engine.sampling.sampler import Sampler


def random_logits(rows: int, vocab: int = 300) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_are_the_float32_log_softmax(dtype: torch.dtype) -> None:
    logits_TV = random_logits(9).to(dtype)
    targets = [(7 * row) % 300 for row in range(9)]
    exact = logits_TV.double().log_softmax(-1)
    for row, entry in enumerate(token_logprobs(logits_TV, targets, [5] * 9)):
        assert entry.token_id == targets[row]
        assert entry.logprob == pytest.approx(float(exact[row, targets[row]]), abs=1e-5)
        best = sorted(range(300), key=lambda id_: (-float(logits_TV[row, id_]), id_))[:5]
        assert [token_id for token_id, _ in entry.top] == best
        assert [value for _, value in entry.top] == pytest.approx(exact[row, best].tolist(), abs=1e-5)


def test_each_row_gets_as_many_alternatives_as_it_asked_for() -> None:
    entries = token_logprobs(random_logits(4), [0, 1, 2, 3], [0, 3, 20, 1])
    assert [len(entry.top) for entry in entries] == [0, 3, 20, 1]
    assert entries[1].top == token_logprobs(random_logits(4)[1:2], [1], [3])[0].top
    assert [len(entry.top) for entry in token_logprobs(random_logits(1, vocab=4), [0], [20])] == [4]


def test_equal_scores_are_listed_by_lower_id_so_the_greedy_token_is_the_first_alternative() -> None:
    logits_TV = torch.zeros(1, 300)
    logits_TV[0, [250, 30, 100, *range(101, 109)]] = 5.0
    one = Request("a", "t", [1], SamplingParams(temperature=0.0, logprobs=2))
    rows = Sampler().sample(logits_TV, [one])
    entry = rows.logprobs[0]
    assert entry is not None
    assert rows.token_ids == [30]
    assert [token_id for token_id, _ in entry.top] == [30, 100]


def test_sampled_logprobs_ignore_temperature_penalties_and_bias() -> None:
    logits_RV = random_logits(2)
    plain = Request("a", "t", [1], SamplingParams(temperature=0.0, logprobs=4))
    forced = Request(
        "b", "t", [1],
        SamplingParams(temperature=0.5, logprobs=4, logit_bias=((7, 100.0),), frequency_penalty=2.0, top_p=0.5),
        output_ids=[3, 7],
    )  # fmt: skip
    entries = Sampler().sample(logits_RV, [plain, forced]).logprobs
    assert entries == token_logprobs(logits_RV, [int(logits_RV[0].argmax()), 7], [4, 4])


def test_prompt_logprobs_in_chunks_equal_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_TV, targets = random_logits(50).bfloat16(), list(range(50))
    at_once = Sampler().prompt_logprobs(logits_TV, targets, 3)
    monkeypatch.setattr(logprobs_module, "_CHUNK_ELEMENTS", 300 * 7)
    assert Sampler().prompt_logprobs(logits_TV, targets, 3) == at_once
    assert Sampler().prompt_logprobs(logits_TV[:0], [], 3) == []


def test_impossible_tokens_have_a_number_that_json_can_hold_and_nan_is_not_hidden() -> None:
    logits_TV = random_logits(2, vocab=5)
    logits_TV[0, 3] = -torch.inf
    logits_TV[1, 0] = torch.nan
    possible, broken = token_logprobs(logits_TV, [3, 1], [5, 1])
    assert possible.logprob == LOWEST_LOGPROB == possible.top[-1][1]
    assert json.loads(json.dumps(possible.top, allow_nan=False))
    assert math.isnan(broken.logprob)
