from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as hf

from server.engine.request import InvalidRequest, Request, SamplingParams
from server.engine.sampling.sampler import Draw, Sampler, uniforms, validate_params
from server.engine.sampling.token_picking import ordered_topk

VOCAB = 1500  # wide enough for the first candidates to be a part of it
_ids = count()


def request(prompt_ids: list[int] | None = None, output_ids: list[int] | None = None, **fields: object) -> Request:
    params = SamplingParams(**{"max_tokens": 1000, **fields})
    return Request(f"r{next(_ids)}", "tenant", prompt_ids or [1], params, output_ids=output_ids or [])


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def expected_probs(logits_V: torch.Tensor, params: SamplingParams, seen: list[int] | None = None) -> torch.Tensor:
    """transformers' own processors, in transformers' own order."""
    ids, scores = torch.tensor([seen or []], dtype=torch.int64), logits_V.float()[None]
    steps: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = []
    if params.repetition_penalty != 1.0:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1.0:
        steps.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        steps.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(hf.MinPLogitsWarper(params.min_p))
    for step in steps:
        scores = step(ids, scores)
    return scores.double().softmax(-1)[0]


def draw(sampler: Sampler, logits_V: torch.Tensor, num_draws: int, **fields: object) -> torch.Tensor:
    """How often each token is drawn, over requests with seeds 0, 1, 2, ..."""
    requests = [request(seed=seed, **fields) for seed in range(num_draws)]
    tokens: list[int] = []
    for start in range(0, num_draws, 2000):
        part = requests[start : start + 2000]
        tokens += sampler.sample(logits_V.expand(len(part), -1), part).token_ids
    return torch.bincount(torch.tensor(tokens), minlength=len(logits_V))


def chi_square_sigmas(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Standard deviations by which the counts differ more than chance would; entries too rare to count are pooled."""
    expected = probs * counts.sum()
    order = expected.argsort(descending=True)
    expected, counts = expected[order], counts[order].double()
    is_rare = expected < 8
    if is_rare.any():
        expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
        counts = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]])
    expected, counts = expected[expected > 0], counts[: len(expected[expected > 0])]
    degrees = max(len(expected) - 1, 1)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - degrees) / math.sqrt(2 * degrees)


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_k": 7},
    {"top_p": 0.8},
    {"top_p": 0.95, "temperature": 2.0},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.7},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 1.7},
    {"top_p": 0.99, "min_p": 0.02},
    {"top_k": 10**6},
    {"top_k": VOCAB - 1, "temperature": 1.5},
    {"min_p": 1.0},
    {"top_p": 1e-6},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_frequencies_are_the_exact_probabilities(fields: dict[str, float]) -> None:
    logits_V = random_logits(1)[0] / 2
    probs = expected_probs(logits_V, SamplingParams(**fields))
    counts = draw(Sampler(), logits_V, 6000, **fields)
    assert counts[probs == 0].sum() == 0, "a filtered token was drawn"
    assert chi_square_sigmas(counts, probs) < 5


def test_the_frequency_check_notices_a_wrong_temperature() -> None:
    logits_V = random_logits(1)[0]
    counts = draw(Sampler(), logits_V, 6000, temperature=1.1)
    assert chi_square_sigmas(counts, expected_probs(logits_V, SamplingParams())) > 5


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.999}], ids=str)
def test_frequencies_are_exact_along_one_request(fields: dict[str, float]) -> None:
    logits_V, sampler, one = random_logits(1, vocab=50)[0], Sampler(), request(seed=5, **fields)
    tokens = []
    for _ in range(4000):
        tokens += sampler.sample(logits_V[None], [one]).token_ids
        one.output_ids.append(tokens[-1])
    probs = expected_probs(logits_V, one.params)
    assert chi_square_sigmas(torch.bincount(torch.tensor(tokens), minlength=50), probs) < 5


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_what_the_filters_keep_is_what_transformers_keeps(
    fields: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest and the largest draw reach both ends of what is kept; every token in between by a sweep."""
    logits_RV = random_logits(5, seed=3)
    sweep = torch.linspace(0, 1, 3001, dtype=torch.float64)[:-1]
    for logits_V in logits_RV:
        probs = expected_probs(logits_V, SamplingParams(**fields))
        requests = [request(**fields) for _ in sweep]
        monkeypatch.setattr("server.engine.sampling.sampler.uniforms", lambda *_: sweep.numpy())
        drawn = Sampler().sample(logits_V.expand(len(sweep), -1), requests).token_ids
        kept = set(probs.nonzero().flatten().tolist())
        assert set(drawn) <= kept
        likely = set((probs > 2 / len(sweep)).nonzero().flatten().tolist())
        assert likely <= set(drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_rows_get_the_best_token_of_any_dtype_and_lower_ids_first(dtype: torch.dtype) -> None:
    logits_RV = random_logits(4).to(dtype)
    logits_RV[1, [9, 5, 300]] = 50.0
    tokens = Sampler().sample(logits_RV, [request(temperature=0.0) for _ in range(4)]).token_ids
    assert tokens == logits_RV.float().argmax(-1).tolist()
    assert tokens[1] == 5


@pytest.mark.parametrize("fields", [{"temperature": 1e-9}, {"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6},
                                    {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 2.0**-126}], ids=str)  # fmt: skip
def test_limits_of_each_filter_are_greedy(fields: dict[str, float]) -> None:
    logits_RV = random_logits(50) * 20
    rows = Sampler().sample(logits_RV, [request(**fields) for _ in range(50)])
    assert rows.token_ids == logits_RV.argmax(-1).tolist()
    assert not any(rows.non_finite)


def test_logits_are_left_as_they_are() -> None:
    logits_RV = random_logits(4)
    before = logits_RV.clone()
    fields = [{"logit_bias": ((3, 5.0),)}, {"frequency_penalty": 1.0}, {"top_p": 0.5}, {"min_p": 0.5, "logprobs": 2}]
    Sampler().sample(logits_RV, [request(output_ids=[1], **entry) for entry in fields])
    Sampler().sample(logits_RV, [request(**entry) for entry in fields[2:] * 2])
    assert torch.equal(logits_RV, before)


# --- seeds


def company(rng: random.Random, rows: int) -> list[Request]:
    """Requests of every kind."""
    kinds = [*FILTERS, {"temperature": 0.0}, {"repetition_penalty": 1.3}, {"logprobs": 3}, {"seed": 4},
             {"logit_bias": ((7, 50.0),), "min_tokens": 3}]  # fmt: skip
    return [request(prompt_ids=[3, 4], output_ids=[7, 7], **rng.choice(kinds)) for _ in range(rows)]


@pytest.mark.parametrize("fields", [*FILTERS, {"presence_penalty": 1.0, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seeded_request_gets_the_same_tokens_in_any_company_and_row(
    fields: dict[str, float], dtype: torch.dtype
) -> None:
    rng, length = random.Random(0), 12
    own_logits = random_logits(length, seed=11).to(dtype)  # bfloat16: many equal scores

    def run(alone: bool) -> list[int]:
        sampler, one = Sampler(), request(seed=1234, **fields)
        for step in range(length):
            others = [] if alone else company(rng, rng.randrange(1, 6))
            row = rng.randrange(len(others) + 1)
            requests = [*others[:row], one, *others[row:]]
            logits_RV = random_logits(len(requests), seed=rng.randrange(10**6)).to(dtype)
            logits_RV[row] = own_logits[step]
            one.output_ids.append(sampler.sample(logits_RV, requests).token_ids[row])
        return one.output_ids

    assert run(alone=True) == run(alone=False) == run(alone=False)


def test_requests_without_a_seed_differ_and_repeat_under_the_samplers_seed() -> None:
    logits_RV = random_logits(1).expand(20, -1) / 3
    first, second = (Sampler(seed=1).sample(logits_RV, [request() for _ in range(20)]).token_ids for _ in range(2))
    assert first == second
    assert len(set(first)) > 5


def test_uniforms_are_uniform_and_independent_over_keys_and_positions() -> None:
    keys = torch.arange(3000, dtype=torch.int64).numpy().astype("uint64")
    table = torch.stack([torch.from_numpy(uniforms(keys, [position] * 3000)) for position in range(20)])
    assert table.min() >= 0
    assert table.max() < 1
    assert chi_square_sigmas(torch.histc(table.flatten(), 100, 0, 1), torch.full((100,), 0.01).double()) < 5
    assert torch.corrcoef(table).fill_diagonal_(0).abs().max() < 0.1


# --- bias, penalties, min_tokens


def greedy_scores(sampler: Sampler, logits_RV: torch.Tensor, requests: list[Request]) -> torch.Tensor:
    """The scores that tokens are chosen from."""
    return sampler._edited(logits_RV, sampler._plan_for(logits_RV, requests), Draw(requests))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    rng, logits_RV = random.Random(1), random_logits(6)
    requests = [
        request([rng.randrange(VOCAB) for _ in range(30)], [rng.randrange(VOCAB) for _ in range(20)],
                repetition_penalty=penalty)
        for _ in range(6)
    ]  # fmt: skip
    processor = hf.RepetitionPenaltyLogitsProcessor(penalty)
    ids = torch.tensor([one.prompt_ids + one.output_ids for one in requests])
    assert torch.equal(greedy_scores(Sampler(), logits_RV, requests), processor(ids, logits_RV))


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits_RV = random_logits(3)
    requests = [
        request([8, 9], [5, 5, 6], presence_penalty=0.5, frequency_penalty=0.25),
        request([8, 9], [5, 5, 6]),
        request([8, 9], [5, 8], repetition_penalty=2.0, frequency_penalty=-1.0, presence_penalty=0.5),
    ]
    expected = logits_RV.clone()
    expected[0, 5] -= 0.5 + 2 * 0.25
    expected[0, 6] -= 0.5 + 0.25
    for token_id, times in ((5, 1), (8, 1), (9, 0)):
        value = expected[2, token_id]
        expected[2, token_id] = (value / 2 if value > 0 else value * 2) + times / 2
    torch.testing.assert_close(greedy_scores(Sampler(), logits_RV, requests), expected, rtol=0, atol=1e-6)


def test_penalties_kept_step_by_step_equal_penalties_of_the_whole_history_through_preemption() -> None:
    rng, sampler = random.Random(2), Sampler()
    fields = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.7}
    requests = [request([rng.randrange(VOCAB) for _ in range(10)], **fields) for _ in range(4)]
    for step in range(150):
        running = [one for one in requests if rng.random() < 0.8] or requests  # the others are preempted
        logits_RV = random_logits(len(running), seed=step)
        twins = [request(one.prompt_ids, list(one.output_ids), **fields) for one in running]
        assert torch.equal(greedy_scores(sampler, logits_RV, running), greedy_scores(Sampler(), logits_RV, twins))
        for one in running:
            one.output_ids.append(rng.randrange(VOCAB))
        if step == 100:
            requests[0].output_ids[:] = [3, 3, 4]  # not a continuation: counted again from the start
        if step == 120:
            sampler.forget(requests[1].id)


def test_penalties_cost_the_new_tokens_only_and_are_dropped_with_the_request() -> None:
    class CountedList(list[int]):
        reads = 0

        def __getitem__(self, key: object) -> object:
            found = super().__getitem__(key)  # type: ignore[index]
            CountedList.reads += len(found) if isinstance(key, slice) else 1
            return found

    sampler, one = Sampler(), request([1], CountedList([2] * 500), frequency_penalty=1.0)  # type: ignore[arg-type]
    sampler.sample(random_logits(1), [one])
    CountedList.reads = 0
    for _ in range(10):
        one.output_ids.append(7)
        sampler.sample(random_logits(1), [one])
    assert CountedList.reads <= 10 * 3
    assert list(sampler._histories) == [one.id]
    sampler.forget(one.id)
    assert not sampler._histories


def test_a_token_outside_the_vocabulary_never_penalises_another_row() -> None:
    logits_RV = random_logits(2)
    requests = [request([VOCAB + 3, -1], [VOCAB + 4], repetition_penalty=2.0), request()]
    assert torch.equal(greedy_scores(Sampler(), logits_RV, requests), logits_RV)


def test_logit_bias_forces_and_forbids_tokens_of_its_own_row_only() -> None:
    logits_RV = random_logits(3).clamp(-20, 20)
    best = logits_RV.argmax(-1).tolist()
    requests = [
        request(temperature=0.0, logit_bias=((17, 100.0),)),
        request(temperature=0.0),
        request(temperature=0.0, logit_bias=((best[2], -100.0),)),
    ]
    tokens = Sampler().sample(logits_RV, requests).token_ids
    logits_RV[2, best[2]] = -torch.inf
    assert tokens == [17, best[1], int(logits_RV[2].argmax())]


def test_min_tokens_bans_end_of_sequence_and_stop_tokens_until_it_is_reached() -> None:
    logits_V = torch.zeros(1, VOCAB)
    logits_V[0, [5, 6, 7]] = torch.tensor([30.0, 20.0, 10.0])
    sampler = Sampler(eos_ids=[5, VOCAB + 9])
    fields = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (6,)}
    one, ignoring = request(**fields), request(ignore_eos=True, **fields)
    tokens = []
    for _ in range(4):
        tokens.append(sampler.sample(logits_V.expand(2, -1), [one, ignoring]).token_ids)
        one.output_ids.append(tokens[-1][0])
        ignoring.output_ids.append(tokens[-1][1])
    assert tokens == [[7, 5], [7, 5], [5, 5], [5, 5]]


def test_min_tokens_bans_the_end_of_a_chats_turn_too() -> None:
    logits_V = torch.zeros(1, VOCAB)
    logits_V[0, [5, 7]] = torch.tensor([30.0, 10.0])
    rows = [request(temperature=0.0, min_tokens=1, end_ids=ends) for ends in ((5,), ())]
    assert Sampler().sample(logits_V.expand(2, -1), rows).token_ids == [7, 5]


def test_impossible_tokens_are_never_drawn() -> None:
    logits_V = torch.full((VOCAB,), -torch.inf)
    logits_V[[3, 1499]] = torch.tensor([0.0, math.log(3)])
    for fields in ({}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 0.01}, {"logit_bias": ((8, 100.0),)}):
        counts = draw(Sampler(), logits_V, 2000, **fields)
        assert counts[3] + counts[1499] == 2000
        assert abs(int(counts[1499]) - 1500) < 100


# --- bad rows, plans


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5, "logprobs": 2},
                                    {"min_tokens": 1, "frequency_penalty": 1.0}], ids=str)  # fmt: skip
def test_a_bad_row_is_named_and_harms_no_other(bad: float, fields: dict[str, float]) -> None:
    logits_RV = random_logits(4)
    good = Sampler().sample(logits_RV, [request(seed=1, **fields) for _ in range(4)])
    damaged = logits_RV.clone()
    damaged[1, 60] = bad
    damaged[3] = -torch.inf
    rows = Sampler().sample(damaged, [request(seed=1, **fields) for _ in range(4)])
    assert rows.non_finite == [False, True, False, True]
    assert rows.token_ids == [good.token_ids[0], -1, good.token_ids[2], -1]
    assert rows.logprobs == [good.logprobs[0], None, good.logprobs[2], None]


def test_minus_infinity_in_a_row_is_no_fault() -> None:
    logits_RV = random_logits(2)
    logits_RV[:, 100:] = -torch.inf
    assert Sampler().sample(logits_RV, [request(temperature=0.0), request()]).non_finite == [False, False]


EXTREMES: list[dict[str, Any]] = [
    {"repetition_penalty": 2.0**-126},
    {"repetition_penalty": 10.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    {"repetition_penalty": 2.0**-126, "presence_penalty": -2.0, "frequency_penalty": -2.0},
    {"logit_bias": tuple((id_, -100.0) for id_ in range(64))},
    {"logit_bias": tuple((id_, 100.0) for id_ in range(64)), "repetition_penalty": 2.0**-100},
    {"min_tokens": 9, "max_tokens": 9, "stop_token_ids": tuple(range(64))},
    {"min_tokens": 9, "max_tokens": 9, "stop_token_ids": tuple(range(64)), "repetition_penalty": 2.0**-126},
]
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 2.0},
    {"temperature": 2.0**-126},
    {"temperature": 1e-5, "top_k": 7},
    {"top_p": 2.0**-126},
    {"min_p": 2.0**-126, "top_p": 0.9},
]


@pytest.mark.parametrize("size", [1.0, 1e10, 3e38], ids=str)
@pytest.mark.parametrize("fields", EXTREMES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_no_parameters_make_a_sound_row_a_fault(size: float, fields: dict[str, Any], way: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits_RV = (torch.rand(6, 64, generator=generator) * 2 - 1) * size
    logits_RV[3, 1:] = -torch.inf  # a model may rule out all tokens but one
    logits_RV[5, 30] = torch.nan
    requests = [request(list(range(64)), [5, 5, 6], **fields, **way) for _ in range(6)]
    rows = Sampler(eos_ids=[1, 2]).sample(logits_RV, requests)
    assert rows.non_finite == [False] * 5 + [True]
    assert all(0 <= token_id < 64 for token_id in rows.token_ids[:5])
    assert rows.token_ids[3] == 0


def test_a_banned_token_is_sampled_only_if_no_other_is_left() -> None:
    logits_RV = torch.zeros(3, 64)
    logits_RV[1, 2:] = -torch.inf
    fields = {"min_tokens": 9, "max_tokens": 9, "stop_token_ids": (0, 1), "repetition_penalty": 2.0**-126}
    for seed in range(50):
        rows = Sampler().sample(logits_RV, [request([0, 1], seed=seed, **fields) for _ in range(3)])
        assert rows.token_ids[0] >= 2
        assert rows.token_ids[1] < 2
        assert rows.token_ids[2] >= 2


FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@pytest.mark.parametrize("value", [1e-46, 1e-39, 5e-324, -1e-46])
@pytest.mark.parametrize("name", [*FLOATS, "logit_bias"])
def test_a_number_that_float32_cannot_hold_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**{name: ((1, value),) if name == "logit_bias" else value})
    assert refusal.value.param == name
    assert str(value) in refusal.value.message


def test_every_float_parameter_is_checked_so() -> None:
    """A parameter that is added later is one of these."""
    assert {field.name for field in dataclasses.fields(SamplingParams) if field.type == "float"} == set(FLOATS)


def test_a_wide_vocabulary_with_a_flat_row_looks_beyond_the_first_candidates() -> None:
    logits_V = torch.zeros(3000)
    counts = draw(Sampler(), logits_V, 1500, top_p=0.5)
    assert counts[1500:].sum() == 0
    assert (counts[:1500] > 0).sum() > 800
    counts = draw(Sampler(), logits_V, 1500, top_k=100)
    assert counts[100:].sum() == 0
    assert (counts[:100] > 0).all()


@pytest.mark.parametrize("k", [1, 10, 128, 999, 1000])
def test_ranking_is_by_score_then_by_lower_id(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    scores_RV = torch.randint(-40, 40, (6, 1000), generator=generator) / 8.0  # about 12 of each
    scores_RV[2] = torch.randn(1000, generator=generator) * 1e30
    scores_RV[3] = torch.randn(1000, generator=generator) * 1e-40
    scores_RV[4, ::2] = -torch.inf
    scores_RV[5] = torch.tensor([0.0, -0.0]).repeat(500)
    values_RK, ids_RK = ordered_topk(scores_RV, k)
    assert torch.equal(values_RK, scores_RV.gather(-1, ids_RK))
    for row, scores in enumerate(scores_RV.tolist()):
        best = sorted(range(1000), key=lambda id_: (-scores[id_], id_))[:k]
        ids, edge = ids_RK[row].tolist(), scores[best[-1]]
        is_defined = [scores[id_] != edge or k == 1000 for id_ in best]
        assert [id_ for id_, ok in zip(ids, is_defined, strict=True) if ok] == [
            id_ for id_, ok in zip(best, is_defined, strict=True) if ok
        ]
        assert values_RK[row].tolist() == [scores[id_] for id_ in best]


def test_one_batch_may_mix_every_kind() -> None:
    rng, sampler = random.Random(3), Sampler(eos_ids=[2], seed=0)
    for step in range(20):
        requests = company(rng, 9)
        logits_RV = random_logits(9, seed=step)
        rows = sampler.sample(logits_RV, requests)
        assert len(rows.token_ids) == len(rows.logprobs) == len(rows.non_finite) == 9
        for one, token_id, entry in zip(requests, rows.token_ids, rows.logprobs, strict=True):
            assert 0 <= token_id < VOCAB
            assert (entry is not None) == (one.params.logprobs is not None)
            assert entry is None or entry.token_id == token_id


def test_a_reused_sampler_follows_the_batch_as_it_changes() -> None:
    sampler = Sampler()
    one, two = request(temperature=0.0), request(temperature=0.0, logit_bias=((9, 100.0),))
    logits_RV = random_logits(2)
    best = logits_RV.argmax(-1).tolist()
    assert sampler.sample(logits_RV, [one, two]).token_ids == [best[0], 9]
    assert sampler.sample(logits_RV, [two, one]).token_ids == [9, best[1]]
    assert sampler.sample(logits_RV[:1], [one]).token_ids == [best[0]]
    assert sampler.sample(logits_RV[:0], []).token_ids == []
    assert sampler.sample(logits_RV[:1], [one]).token_ids == [best[0]]
    sampler.forget(one.id)
    one.params = SamplingParams(temperature=0.0, logit_bias=((8, 100.0),))  # the id of one that is over may return
    assert sampler.sample(logits_RV[:1], [one]).token_ids == [8]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"logit_bias": ((VOCAB, 1.0),)}, "logit_bias", "1500; ids must be in"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias", "-1"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "logit_bias", "3 more than once"),
        ({"stop_token_ids": (10**9,)}, "stop_token_ids", "1000000000"),
    ],
)
def test_token_ids_that_the_vocabulary_lacks_are_refused_at_admission(
    fields: dict[str, object], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        validate_params(SamplingParams(**fields), VOCAB)
    assert caught.value.param == param
    validate_params(SamplingParams(logit_bias=((VOCAB - 1, 1.0),), stop_token_ids=(0,)), VOCAB)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_what_the_cpu_draws() -> None:
    rng = random.Random(4)
    for step in range(20):
        requests = [request(seed=step, **rng.choice(FILTERS)) for _ in range(8)]
        logits_RV = random_logits(8, seed=step)
        on_cpu, on_gpu = Sampler().sample(logits_RV, requests), Sampler().sample(logits_RV.cuda(), requests)
        assert on_cpu.token_ids == on_gpu.token_ids
