"""Tokens that are sampled before the previous one is known."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from server.engine.request import Request, SamplingParams
from server.engine.sampling.sampler import Sampler

_ids = itertools.count()


def request(output_ids: tuple[int, ...] = (), **fields: Any) -> Request:
    params = SamplingParams(**{"max_tokens": 1000, **fields})
    return Request(f"r{next(_ids)}", "tenant", [1], params, output_ids=list(output_ids))


def random_logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, 300, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(
    "fields", [{"seed": 3}, {"seed": 4, "top_k": 20}, {"temperature": 0.0, "min_tokens": 3}], ids=str
)
def test_a_draw_before_the_last_token_is_known_is_the_draw_after_it(fields: dict[str, Any]) -> None:
    """And what is launched has read its logits, whatever is written there before the tokens are read."""
    logits_RV = random_logits(4)
    logits_RV[:, 5] += 9.0
    sampler = Sampler([5])
    early = [request(output_ids=(7,), logprobs=2, **fields) for _ in range(4)]
    known = [request(output_ids=(7, 8), logprobs=2, **fields) for _ in range(4)]
    expected = Sampler([5]).sample(logits_RV, known)
    launched = sampler.launch(buffer := logits_RV.clone(), early, num_unknown=1)
    assert launched.may_be_followed
    buffer.fill_(-torch.inf)
    assert launched.read() == expected


def test_a_row_that_would_make_the_host_wait_is_left_without_a_token_and_no_other() -> None:
    logits_RV = torch.zeros(3, 5000)  # any of 5,000 tokens
    logits_RV[1, 17] = 100.0
    logits_RV[2, 0] = torch.nan
    requests = [request(seed=index, top_p=0.9) for index in range(3)]
    rows = Sampler().launch(logits_RV, requests, num_unknown=1).read()
    assert rows.undecided == [0]
    assert rows.non_finite == [False, False, True]
    assert rows.token_ids[1] == 17
    assert Sampler().sample(logits_RV, requests).undecided == []


def test_what_needs_the_last_token_may_not_be_followed() -> None:
    sampler, logits_RV = Sampler(), random_logits(2)
    assert sampler.launch(logits_RV, [request(), request(temperature=0.0)]).may_be_followed
    assert not sampler.launch(logits_RV, [request(), request(presence_penalty=0.1)]).may_be_followed
    left = request()
    sampler.resample(left.id)
    assert not sampler.launch(logits_RV, [request(), left]).may_be_followed
    sampler.forget(left.id)
    assert sampler.launch(logits_RV, [request(), left]).may_be_followed
