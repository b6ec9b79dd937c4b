"""Masks that are computed beside the forward: the ones of this draw, whatever was begun before it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from server.engine.request import Request, SamplingParams, TokenConstraint
from server.engine.sampling.masks import Masks, one_by_one
from server.engine.sampling.sampler import Sampler
from support.worlds.world_grammars import GRAMMARS, NUM_TOKENS

_ids = itertools.count()


def request(grammar: int | None, **fields: object) -> Request:
    constraint = None if grammar is None else GRAMMARS[grammar].start()
    params = SamplingParams(max_tokens=100, **{"temperature": 0.0, **fields})  # type: ignore[arg-type]
    return Request(f"r{next(_ids)}", "acme", [1], params, constraint=constraint)


def expected(requests: Sequence[Request]) -> list[list[int]]:
    """By matchers of their own."""
    found = []
    for each in requests:
        matcher = each.constraint.grammar.start()  # type: ignore[union-attr]
        matcher.advance(each.output_ids)
        found.append(matcher.allowed().tolist())
    return found


def test_the_forward_runs_while_masks_are_computed() -> None:
    forward_has_run, threads = threading.Event(), []

    def source(constraints: Sequence[TokenConstraint]) -> NDArray[np.uint8]:
        threads.append(threading.current_thread())
        assert forward_has_run.wait(300)
        return one_by_one(constraints)

    masks, requests = Masks(source), [request(0), request(None), request(1)]
    masks.begin(requests)
    forward_has_run.set()
    assert masks.take(requests).tolist() == expected([requests[0], requests[2]])
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_what_was_begun_for_another_draw_is_not_taken() -> None:
    first, second = [request(0), request(1)], [request(1), request(2)]
    masks = Masks()
    masks.begin(first)
    assert masks.take(second).tolist() == expected(second)
    masks.begin(second)
    masks.begin(first)  # the forward failed: its rows are run one by one
    assert masks.take(first[:1]).tolist() == expected(first[:1])
    masks.begin(first)
    first[0].output_ids.append(int(np.flatnonzero(np.unpackbits(GRAMMARS[0].start().allowed(), bitorder="little"))[0]))
    assert masks.take(first).tolist() == expected(first)


def test_an_error_of_the_computation_reaches_the_draw_that_needs_it_and_no_other() -> None:
    def source(constraints: Sequence[TokenConstraint]) -> NDArray[np.uint8]:
        if len(constraints) == 2:
            raise ArithmeticError("no masks")
        return one_by_one(constraints)

    masks, requests = Masks(source), [request(0), request(1)]
    masks.begin(requests)
    with pytest.raises(ArithmeticError):
        masks.take(requests)
    masks.begin(requests)
    assert masks.take(requests[:1]).tolist() == expected(requests[:1])


@pytest.mark.parametrize("prepares", [True, False])
def test_a_draw_takes_only_allowed_tokens_and_leaves_free_rows_their_bits(prepares: bool) -> None:
    logits_RV = torch.randn(5, NUM_TOKENS, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    requests = [request(0), request(None), request(1, temperature=1.0, seed=4), request(None, seed=3), request(2)]
    sampler, free = Sampler(), Sampler().sample(logits_RV[[1, 3]], [requests[1], requests[3]]).token_ids
    for _ in range(6):
        if prepares:
            sampler.prepare(requests)
        drawn = sampler.sample(logits_RV, requests).token_ids
        assert [drawn[1], drawn[3]] == free
        for row in (0, 2, 4):
            bits = np.unpackbits(np.array(expected([requests[row]])[0], np.uint8), bitorder="little")
            assert bits[drawn[row]]
            requests[row].output_ids.append(drawn[row])
